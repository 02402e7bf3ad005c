"""Nested dropout with a learned token (arXiv 2502.13967): positions past the first `keep_k` become the mask token."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.model.init import MuPInit, init_token
from flextok.model.keep_k import KeepKMode, check_keep_k_mode, checked_keep_ks, sample_keep_k
from flextok.model.packed_list import PackedList
from flextok.model.repeated_tail import replace_tails


def keep_prefix(tokens: Sequence[Tensor], keep_ks: Sequence[int], fill: Tensor) -> PackedList:
    """Entries `[1, n, dim]` with the positions at index >= their `keep_k` replaced by `fill` `[dim]`."""
    packed = PackedList.pack(tokens)
    x = packed.tensor
    # The published decoder casts the mask token to the tokens' dtype.
    fill = fill.to(x.dtype)
    if packed.is_uniform:
        limits = torch.tensor(keep_ks).to(x.device, non_blocking=True)
        kept = torch.arange(x.shape[1], device=x.device) < limits[:, None]
        return PackedList(torch.where(kept[..., None], x, fill))
    position = torch.cat([torch.arange(n) for n in packed.num_tokens])
    limit = torch.tensor(keep_ks).repeat_interleave(torch.tensor(packed.num_tokens))
    kept = (position < limit).to(x.device, non_blocking=True)
    return PackedList(torch.where(kept[:, None], x, fill), packed.shapes)


def nested_dropout_keep_ks(
    data_dict: DataDict,
    mode: KeepKMode,
    batch_tokens: Sequence[int],
    *,
    training: bool,
    eval_key: str,
    sampled_key: str | None,
) -> list[int] | None:
    """`keep_k` of each sample: read in evaluation, None if the key is absent; in training drawn, now or before."""
    key = sampled_key if training else eval_key
    keep_ks = None if key is None else data_dict.get(key)
    if key is not None and keep_ks is not None:
        return checked_keep_ks(keep_ks, len(batch_tokens), key)
    if not training:
        return None
    check_keep_k_mode(mode, batch_tokens)
    return sample_keep_k(mode, batch_tokens, data_dict.get(RNG_KEY))


class MaskedNestedDropout(MuPInit):
    """Replace the tokens at index >= `keep_k` by a learned token.

    Evaluation reads one `keep_k` per sample (a value beyond the number of tokens keeps all) and keeps all tokens if the
    key is absent. Training draws them, unless a `DropoutSampler` did under `sampled_keep_k_read_key` (ours, not in
    published configs), and writes them as a list.
    """

    def __init__(
        self,
        read_write_key: str,
        dim: int,
        eval_keep_k_read_key: str = "eval_keep_k",
        train_keep_k_write_key: str = "train_keep_k",
        size_sampling_mode: KeepKMode = "uniform",
        sampled_keep_k_read_key: str | None = None,
    ) -> None:
        super().__init__()
        check_keep_k_mode(size_sampling_mode)
        self.read_write_key = read_write_key
        self.eval_keep_k_read_key = eval_keep_k_read_key
        self.train_keep_k_write_key = train_keep_k_write_key
        self.size_sampling_mode: KeepKMode = size_sampling_mode
        self.sampled_keep_k_read_key = sampled_keep_k_read_key
        self.dropout_mask_token = nn.Parameter(torch.empty(dim))
        self._init_weights(mup=False)

    def _init_weights(self, *, mup: bool) -> None:
        init_token(self.dropout_mask_token)

    def forward(self, data_dict: DataDict) -> DataDict:
        tokens = PackedList.pack(data_dict[self.read_write_key])
        keep_ks = nested_dropout_keep_ks(
            data_dict,
            self.size_sampling_mode,
            tokens.num_tokens,
            training=self.training,
            eval_key=self.eval_keep_k_read_key,
            sampled_key=self.sampled_keep_k_read_key,
        )
        if keep_ks is None:
            return data_dict
        if self.training:
            data_dict[self.read_write_key] = keep_prefix(tokens, keep_ks, self.dropout_mask_token)
            data_dict[self.train_keep_k_write_key] = keep_ks
        else:
            # The same list, of which a packer can leave out the repeated tokens.
            data_dict[self.read_write_key] = replace_tails(tokens, keep_ks, self.dropout_mask_token)
        return data_dict
