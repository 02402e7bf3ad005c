"""Images or latents, channels last, to patches."""

from collections.abc import Sequence
from math import prod

from einops import rearrange
from torch import Tensor, nn

from flextok.model.data_dict import DataDict
from flextok.model.init import InitStyle, MuPInit, init_linear
from flextok.model.packed_list import PackedList


def get_num_patches(sizes: Sequence[int], patch_sizes: Sequence[int]) -> list[int]:
    """Patches along each axis.

    Raises:
        ValueError: the axes do not match or a size is no multiple of its patch.
    """
    if len(sizes) != len(patch_sizes) or any(size % patch for size, patch in zip(sizes, patch_sizes, strict=True)):
        raise ValueError(f"sizes {list(sizes)} are not multiples of patch_sizes {list(patch_sizes)}")
    return [size // patch for size, patch in zip(sizes, patch_sizes, strict=True)]


def get_num_patches_list(tensors: Sequence[Tensor], patch_sizes: Sequence[int]) -> list[list[int]]:
    """`get_num_patches` of each `[1, *sizes, channels]` entry."""
    return [get_num_patches(tensor.shape[1:-1], patch_sizes) for tensor in tensors]


def patchify(x: Tensor, patch_sizes: Sequence[int], flatten_patches: bool = False) -> tuple[Tensor, list[int]]:
    """Cut `[batch, s1 .. sN, channels]` into `[batch, n1 .. nN, p1 * .. * pN * channels]`, channel fastest.

    With `flatten_patches` the patches form one axis, row-major. Also returns `[n1 .. nN]`.
    """
    num_patches = get_num_patches(x.shape[1:-1], patch_sizes)
    axes = range(len(num_patches))
    split = " ".join(f"(n{i} p{i})" for i in axes)
    grid, cell = " ".join(f"n{i}" for i in axes), " ".join(f"p{i}" for i in axes)
    grid = f"({grid})" if flatten_patches else grid
    sizes = {f"p{i}": patch for i, patch in enumerate(patch_sizes)}
    return rearrange(x, f"b {split} d -> b {grid} ({cell} d)", **sizes), num_patches


def patchify_tensor_list(
    tensors: Sequence[Tensor], patch_sizes: Sequence[int], flatten_patches: bool = False
) -> tuple[PackedList, list[list[int]]]:
    """`patchify` each `[1, *sizes, channels]` entry; one call if all have one shape."""
    if isinstance(tensors, PackedList) and tensors.is_uniform:
        patches, num_patches = patchify(tensors.tensor, patch_sizes, flatten_patches)
        return PackedList(patches), [num_patches] * len(tensors)
    pairs = [patchify(tensor, patch_sizes, flatten_patches) for tensor in tensors]
    return PackedList.pack([patches for patches, _ in pairs]), [num_patches for _, num_patches in pairs]


class PatchEmbedder(MuPInit):
    """Patchify and project each entry to `dim`; `dim=None` leaves the patches as they are."""

    def __init__(
        self,
        input_tensor_list_read_key: str,
        patches_list_write_key: str,
        n_patches_write_key: str,
        patch_sizes: Sequence[int],
        channels_in: int,
        dim: int | None = None,
        flatten_patches: bool = True,
        weight_init_style: InitStyle = "xavier",
    ) -> None:
        super().__init__()
        self.input_tensor_list_read_key = input_tensor_list_read_key
        self.patches_list_write_key = patches_list_write_key
        self.n_patches_write_key = n_patches_write_key
        self.patch_sizes = list(patch_sizes)
        self.flatten_patches = flatten_patches
        self.weight_init_style = weight_init_style
        self.dim_in = prod(self.patch_sizes) * channels_in
        self.dim_out = self.dim_in if dim is None else dim
        self.patch_proj: nn.Module = nn.Identity() if dim is None else nn.Linear(self.dim_in, dim)
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        if isinstance(self.patch_proj, nn.Linear):
            init_linear(self.patch_proj, self.weight_init_style, mup=mup)

    def get_n_patches(self, sizes: Sequence[int]) -> list[int]:
        """Patches along each axis of an input of `sizes`."""
        return get_num_patches(sizes, self.patch_sizes)

    def _project(self, patches: Tensor) -> Tensor:
        if isinstance(self.patch_proj, nn.Linear):
            patches = patches.to(self.patch_proj.weight.dtype)
        return self.patch_proj(patches)

    def forward(self, data_dict: DataDict) -> DataDict:
        entries = PackedList.pack_if_uniform(data_dict[self.input_tensor_list_read_key])
        patches, num_patches = patchify_tensor_list(entries, self.patch_sizes, self.flatten_patches)
        data_dict[self.patches_list_write_key] = patches.map(self._project)
        data_dict[self.n_patches_write_key] = num_patches
        return data_dict
