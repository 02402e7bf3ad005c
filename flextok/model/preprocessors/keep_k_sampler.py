"""Nested dropout's `keep_k` drawn ahead, so that the encoder need not compute tokens that the decoder will drop."""

from torch import nn

from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.model.keep_k import KeepKMode, check_keep_k_mode, sample_keep_k
from flextok.model.packed_list import PackedList


class KeepKSampler(nn.Module):
    """Training: draw one `keep_k` per sample, for the tokens under `read_key`. Evaluation: leave no `keep_k` behind.

    For the modules that are told `sampled_keep_k_read_key`. Not in published configs, where nested dropout draws.
    """

    def __init__(self, read_key: str, sampled_keep_k_write_key: str, size_sampling_mode: KeepKMode = "uniform") -> None:
        super().__init__()
        check_keep_k_mode(size_sampling_mode)
        self.read_key = read_key
        self.sampled_keep_k_write_key = sampled_keep_k_write_key
        self.size_sampling_mode: KeepKMode = size_sampling_mode

    def forward(self, data_dict: DataDict) -> DataDict:
        if not self.training:
            data_dict.pop(self.sampled_keep_k_write_key, None)
            return data_dict
        num_tokens = PackedList.pack(data_dict[self.read_key]).num_tokens
        check_keep_k_mode(self.size_sampling_mode, num_tokens)
        data_dict[self.sampled_keep_k_write_key] = sample_keep_k(
            self.size_sampling_mode, num_tokens, data_dict.get(RNG_KEY)
        )
        return data_dict
