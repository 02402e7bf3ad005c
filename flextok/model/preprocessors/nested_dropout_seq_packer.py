"""The packer of attention-masked nested dropout: one mask for sample separation, order and dropped registers."""

from collections.abc import Sequence
from typing import Any

from flextok.model.data_dict import DataDict
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker


class NestedDropoutSequencePacker(BlockWiseSequencePacker):
    """`BlockWiseSequencePacker` that hides the tokens of the last sub-sequence at index >= `keep_k` of their sample.

    Registers are the last of `input_list_read_keys`; other sub-sequences are never hidden. Hidden tokens neither attend
    nor are attended to, so the other tokens' outputs are those of a sequence without them. With `drop_masked`, and in
    evaluation, they are indeed left out and cost nothing; an unpacker fills their place with zeros. Without
    `keep_k_read_key` in the dictionary all tokens are visible.
    """

    def __init__(
        self,
        *args: Any,
        keep_k_read_key: str = "nested_dropout_keep_k",
        drop_masked: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.keep_k_read_key = keep_k_read_key
        self.drop_masked = drop_masked

    @property
    def _drops(self) -> bool:
        return self.drop_masked or (not self.training and self.shortens_rows and not self.return_materialized_mask)

    def _keep_ks(self, data_dict: DataDict) -> Sequence[int] | None:
        return None if self._drops else self._read_keep_ks(data_dict, self.keep_k_read_key)

    def _limits(self, data_dict: DataDict) -> Sequence[int] | None:
        return self._read_keep_ks(data_dict, self.keep_k_read_key) if self._drops else None
