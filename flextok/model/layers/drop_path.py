"""Stochastic depth."""

import torch
from torch import Tensor, nn

from flextok.attention.engine import AttentionMask
from flextok.attention.layout import SequenceLayout
from flextok.attention.plan import AttentionPlan


class DropPath(nn.Module):
    """Zero a residual branch for a random share of the samples and rescale the rest, in training only.

    Samples are the leading indices or, in a packed row whose layout is given, the samples of the row. Draws, like those
    of `nn.Dropout`, from torch's default generator. Source: arXiv 1603.09382.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob={drop_prob} is not in [0, 1)")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, mask: AttentionMask = None, keep: Tensor | None = None) -> Tensor:
        """`keep`, int64: which tokens of the row x holds; None means all."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        layout = mask.layout if isinstance(mask, AttentionPlan) else mask
        num_samples = len(layout.lengths) if isinstance(layout, SequenceLayout) else x.shape[0]
        factors = (torch.rand(num_samples, device=x.device) >= self.drop_prob).to(x.dtype) / (1.0 - self.drop_prob)
        if isinstance(layout, SequenceLayout):
            lengths = torch.tensor(layout.sample_lengths).to(x.device, non_blocking=True)
            # With the size the device need not tell the host how long the result is.
            rows = factors.repeat_interleave(lengths, output_size=layout.num_tokens)
            rows = nn.functional.pad(rows, (0, layout.row_length - layout.num_tokens))
            return x * (rows if keep is None else rows.index_select(0, keep))[None, :, None]
        return x * factors.view(-1, *(1,) * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"
