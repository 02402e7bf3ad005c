"""A learned token repeated over given sizes."""

from collections.abc import Sequence

import torch
from torch import nn

from flextok.model.data_dict import DataDict
from flextok.model.init import MuPInit, init_token


class MaskTokenModule(MuPInit):
    """Write `[1, *size, dim]` of one learned token for each size list, or for the inner axes of each tensor."""

    def __init__(
        self,
        mask_tokens_write_key: str,
        dim: int,
        sizes_read_key: str | None = None,
        read_sizes_from_key: str | None = None,
    ) -> None:
        super().__init__()
        if (sizes_read_key is None) == (read_sizes_from_key is None):
            raise ValueError(
                f"give exactly one of sizes_read_key (got {sizes_read_key!r}) and "
                f"read_sizes_from_key (got {read_sizes_from_key!r})"
            )
        self.mask_tokens_write_key = mask_tokens_write_key
        self.sizes_read_key = sizes_read_key
        self.read_sizes_from_key = read_sizes_from_key
        self.mask_token = nn.Parameter(torch.empty(dim))
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        init_token(self.mask_token)

    def forward(self, data_dict: DataDict) -> DataDict:
        sizes: list[Sequence[int]] = []
        if self.sizes_read_key is not None:
            sizes = list(data_dict[self.sizes_read_key])
        elif self.read_sizes_from_key is not None:
            sizes = [entry.shape[1:-1] for entry in data_dict[self.read_sizes_from_key]]
        data_dict[self.mask_tokens_write_key] = [self.mask_token.expand(1, *size, -1) for size in sizes]
        return data_dict
