"""REPA (arXiv 2410.06940): patches inside the decoder learn to predict the features of a frozen image encoder."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.data.latent_shards import LATENTS
from flextok.data.shard_index import read_index
from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList

# Mean and deviation of ImageNet's colours in [0, 1], with which DINOv2 was trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FEATURES_KEY = "teacher_features"
"""Where a data dictionary has features that were computed in advance, `[1, rows, columns, width]` of each image."""


class FrozenTeacher:
    """Patch features of a DINOv2; on purpose no `nn.Module`.

    So no owner registers it: it is in no optimizer, average or checkpoint, and `train()` does not reach it.
    """

    def __init__(self, model: Any) -> None:
        """`model` is a ViT of transformers whose last tokens are the patches, such as `Dinov2Model`.

        Raises ValueError for another network.
        """
        config = model.config
        if not all(isinstance(getattr(config, name, None), int) for name in ("patch_size", "hidden_size")):
            raise ValueError(
                f"objective.repa.teacher is a {type(model).__name__}, which says nothing of patches; valid: a DINOv2"
            )
        self.model = model.eval().requires_grad_(False)
        self.patch_size: int = config.patch_size
        self.dim: int = config.hidden_size

    @classmethod
    def load(cls, source: str, *, field: str = "objective.repa.teacher") -> "FrozenTeacher":
        """From a local folder or by a name of the hub; reads safetensors only. `field` is where the user gave it.

        Raises ImportError without transformers, ValueError for what cannot be loaded.
        """
        try:
            transformers = import_module("transformers")
        except ImportError as error:
            raise ImportError(f"{field} needs the package `transformers`: pip install transformers") from error
        try:
            model = transformers.AutoModel.from_pretrained(str(Path(source).expanduser()), use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{field}={source!r} cannot be loaded: {error}; "
                "valid: a folder or a hub name of a DINOv2, such as facebook/dinov2-large"
            ) from error
        return cls(model)

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: Sequence[int]) -> Tensor:
        """Images `[batch, 3, height, width]` in [-1, 1] to features `[batch, *grid, dim]`.

        They are resized so that the teacher has as many patches as `grid`: 16 x 16 at patch 14 are 224 pixels.
        """
        self.model.to(images.device)
        size = [cells * self.patch_size for cells in grid]
        if list(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.model(pixel_values=(images / 2 + 0.5 - mean) / std).last_hidden_state
        # The class token, and registers where there are any, come first.
        return tokens[:, -grid[0] * grid[1] :].unflatten(1, tuple(grid))


class RepaTerm(nn.Module):
    """Negative cosine similarity of projected decoder patches to the teacher's features.

    The projector is trained with the tokenizer and saved in the checkpoints of a run; it is no part of the tokenizer,
    so exports lack it. The layer that is compared is the model's (`size.intermediate_layer`).
    """

    def __init__(
        self,
        *,
        teacher: Any,
        dim: int,
        features_folder: str | None = None,
        weight: float = 0.5,
        hidden_dim: int = 2048,
        num_layers: int = 3,
        features_read_key: str = "dec_patches_repa_layer",
    ) -> None:
        """The projector has `num_layers` linear layers with SiLU between them; one layer has no `hidden_dim`.

        Args:
            teacher: a folder, a hub name, or the network itself; null with `features_folder`, or the name it was made
                with.
            dim: width of the decoder.
            features_folder: a folder of latents that holds the teacher's features; then no teacher is loaded.
            weight: of this term in the loss.
        """
        super().__init__()
        if weight <= 0:
            raise ValueError(f"objective.repa.weight={weight} must be positive; objective=rectified_flow has no REPA")
        if num_layers < 1:
            raise ValueError(f"objective.repa.num_layers={num_layers} must be at least 1")
        self.teacher: FrozenTeacher | None = None
        if features_folder is not None:
            target_dim = _stored_width(features_folder, teacher)
        elif teacher is None:
            raise ValueError("objective.repa.teacher=None cannot be used with images; valid: a folder or a hub name")
        else:
            self.teacher = FrozenTeacher.load(teacher) if isinstance(teacher, str) else FrozenTeacher(teacher)
            target_dim = self.teacher.dim
        self.weight = weight
        self.features_read_key = features_read_key
        widths = [dim, *[hidden_dim] * (num_layers - 1), target_dim]
        layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
        for width_in, width_out in zip(widths[1:-1], widths[2:], strict=True):
            layers += [nn.SiLU(), nn.Linear(width_in, width_out)]
        self.projector = nn.Sequential(*layers)

    def forward(self, shown: Sequence[Tensor], passes: Sequence[DataDict]) -> Tensor:
        """The term, without its weight, of each pass of the decoder over the same images: `[passes]`, in [-1, 1].

        `shown` are the images `[1, 3, height, width]`, or without a teacher their features `[1, rows, columns, width]`.

        Raises ValueError for images of several sizes, whose patch grids differ, and for features of another grid.
        """
        features = [self._features(data) for data in passes]
        grid = features[0].shape[1:-1]
        target = PackedList.pack(shown).tensor
        if self.teacher is not None:
            target = self.teacher(target, grid)
        elif target.shape[1:3] != grid:
            raise ValueError(
                f"data.root holds features of {list(target.shape[1:3])} patches, but the decoder has {list(grid)}; "
                f"valid: a folder made with --feature-size {grid[0]}"
            )
        similarities = [F.cosine_similarity(self.projector(x).float(), target.float(), dim=-1).mean() for x in features]
        return -torch.stack(similarities)

    def _features(self, data: DataDict) -> Tensor:
        """`[batch, rows, columns, width]`."""
        if self.features_read_key not in data:
            raise ValueError(
                f"objective.repa.features_read_key={self.features_read_key!r} is not written by the decoder; "
                "valid: what dec_repa_unpacker writes for the patches"
            )
        features = PackedList.pack(data[self.features_read_key])
        if not features.is_uniform or features.tensor.ndim != 4:
            raise ValueError(
                f"objective.repa.features_read_key={self.features_read_key!r} holds entries {features.shapes[:2]}...; "
                "valid: [1, rows, columns, width], of one size in a batch"
            )
        return features.tensor


def _stored_width(folder: str, teacher: Any) -> int:
    """Width of the features in a folder of latents; raises ValueError unless it holds those of this teacher."""
    index = read_index(Path(folder).expanduser(), LATENTS)
    made = index["settings"].get("features")
    if made is None or "features_shape" not in index:
        raise ValueError(
            f"data.root={folder!r} holds no features, which objective=repa needs; valid: a folder made with "
            "flextok latents --features, data of images, or another objective"
        )
    if teacher not in (None, made["teacher"]):
        raise ValueError(
            f"objective.repa.teacher={teacher!r} does not fit data.root={folder!r}; valid: {made['teacher']!r}, whose "
            "features it holds, or null"
        )
    return int(index["features_shape"][-1])
