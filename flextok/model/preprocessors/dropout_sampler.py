"""What the decoder will drop, drawn ahead, so that the encoder need not compute it."""

from torch import nn

from flextok.model.data_dict import RNG_KEY, DataDict
from flextok.model.keep_k import KeepKMode, check_keep_k_mode, sample_keep_k
from flextok.model.packed_list import PackedList
from flextok.model.preprocessors.nullcond import sample_null_flags


class DropoutSampler(nn.Module):
    """Training: draw `keep_k` and a null flag for each sample of `read_key`. Evaluation: leave none behind.

    They are used by modules that are told `sampled_keep_k_read_key` or `sampled_null_read_key`. Not in published
    configs, where nested dropout and the null condition draw for themselves.
    """

    def __init__(
        self,
        read_key: str,
        sampled_keep_k_write_key: str,
        sampled_null_write_key: str,
        size_sampling_mode: KeepKMode = "uniform",
        null_prob: float = 0.0,
    ) -> None:
        super().__init__()
        check_keep_k_mode(size_sampling_mode)
        self.read_key = read_key
        self.sampled_keep_k_write_key = sampled_keep_k_write_key
        self.sampled_null_write_key = sampled_null_write_key
        self.size_sampling_mode: KeepKMode = size_sampling_mode
        self.null_prob = null_prob

    def forward(self, data_dict: DataDict) -> DataDict:
        for key in (self.sampled_keep_k_write_key, self.sampled_null_write_key):
            data_dict.pop(key, None)
        if not self.training:
            return data_dict
        num_tokens, rng = PackedList.pack(data_dict[self.read_key]).num_tokens, data_dict.get(RNG_KEY)
        check_keep_k_mode(self.size_sampling_mode, num_tokens)
        data_dict[self.sampled_keep_k_write_key] = sample_keep_k(self.size_sampling_mode, num_tokens, rng)
        if self.null_prob > 0:
            data_dict[self.sampled_null_write_key] = sample_null_flags(self.null_prob, len(num_tokens), rng)
        return data_dict
