"""Nested dropout without a learned token: dropped tokens are hidden from attention by the packer that follows."""

from torch import nn

from flextok.model.data_dict import DataDict
from flextok.model.keep_k import KeepKMode, check_keep_k_mode
from flextok.model.packed_list import PackedList
from flextok.model.preprocessors.token_dropout import nested_dropout_keep_ks


class AttentionMaskedNestedDropout(nn.Module):
    """Write one `keep_k` per sample and leave the tokens alone; no parameters.

    `keep_k` is always written: in evaluation without `eval_keep_k_read_key` it is the number of tokens, so that no
    stale value of an earlier call is used. In training it is drawn, unless a `DropoutSampler` did under
    `sampled_keep_k_read_key` (ours, not in published configs). `read_key` is another name of `read_write_key`.
    `block_mask_write_key` is accepted for configs of other trainers; the mask is written by
    `NestedDropoutSequencePacker`.
    """

    def __init__(
        self,
        read_write_key: str | None = None,
        keep_k_write_key: str = "nested_dropout_keep_k",
        eval_keep_k_read_key: str = "eval_keep_k",
        train_keep_k_write_key: str = "train_keep_k",
        size_sampling_mode: KeepKMode = "uniform",
        block_mask_write_key: str = "nested_dropout_block_mask",
        read_key: str | None = None,
        sampled_keep_k_read_key: str | None = None,
    ) -> None:
        super().__init__()
        names = {name for name in (read_write_key, read_key) if name is not None}
        if len(names) != 1:
            raise ValueError(
                f"give read_write_key, or read_key as its other name; got {read_write_key!r}, {read_key!r}"
            )
        check_keep_k_mode(size_sampling_mode)
        self.read_key = names.pop()
        self.keep_k_write_key = keep_k_write_key
        self.eval_keep_k_read_key = eval_keep_k_read_key
        self.train_keep_k_write_key = train_keep_k_write_key
        self.size_sampling_mode: KeepKMode = size_sampling_mode
        self.sampled_keep_k_read_key = sampled_keep_k_read_key

    def forward(self, data_dict: DataDict) -> DataDict:
        num_tokens = PackedList.pack(data_dict[self.read_key]).num_tokens
        keep_ks = nested_dropout_keep_ks(
            data_dict,
            self.size_sampling_mode,
            num_tokens,
            training=self.training,
            eval_key=self.eval_keep_k_read_key,
            sampled_key=self.sampled_keep_k_read_key,
        )
        data_dict[self.keep_k_write_key] = list(num_tokens) if keep_ks is None else keep_ks
        if self.training:
            data_dict[self.train_keep_k_write_key] = keep_ks
        return data_dict
