"""Which attention backend is fastest at which length and head size? `python -m benchmarks.attention_backends`

Eight samples in one packed row, in the three layouts the trunks use: samples of one length; ragged ones, each with its
patches and between one and as many registers; and the encoder's `causal_last`. `dense row` is the baseline, one matrix
of scores over the whole row. A backend that cannot run is listed with the reason. float32 on a CPU, bfloat16 on a GPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.command import parse, parser, write
from benchmarks.harness import measure_in_turn, print_table
from flextok.attention.engine import Backend, attend
from flextok.attention.layout import SequenceLayout, layout_of

NUM_SAMPLES, NUM_HEADS = 8, 4
LENGTHS = {"cpu": (64, 128, 256), "cuda": (128, 256, 512)}
"""Tokens of a sample at full length, half of them patches."""
HEAD_DIMS = (32, 64, 128)
BASELINE = "dense row"


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("attention_backends", __doc__, repeats=5)
    command.add_argument("--lengths", nargs="+", type=int, help="tokens of a sample at full length")
    command.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    options = parse(command, arguments)
    rows: list[dict[str, Any]] = []
    for length in options.lengths or LENGTHS[options.device.type]:
        for name, layout in layouts(length).items():
            for head_dim in options.head_dims:
                for backward in (False, True):
                    sizes = {"layout": name, "length": length, "head_dim": head_dim, "backward": backward}
                    found = measure_backends(
                        layout, head_dim, backward=backward, repeats=options.repeats, device=options.device
                    )
                    rows += [sizes | row for row in found]
    print_table([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    write(options, {"samples": NUM_SAMPLES, "heads": NUM_HEADS, "rows": rows})


def layouts(length: int) -> dict[str, SequenceLayout]:
    """The layouts of samples of at most `length` tokens, by name."""
    num_patches = length // 2
    keep_ks = torch.randint(1, num_patches + 1, (NUM_SAMPLES,), generator=torch.Generator().manual_seed(length))
    uniform = [(num_patches, num_patches)] * NUM_SAMPLES
    return {
        "full": layout_of(uniform),
        "ragged": layout_of([(num_patches, keep_k) for keep_k in keep_ks.tolist()]),
        "causal_last": layout_of(uniform, mode="causal_last"),
    }


def measure_backends(
    layout: SequenceLayout, head_dim: int, *, backward: bool, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each backend: median seconds, the largest difference to the baseline, or the reason for neither."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, NUM_HEADS, layout.row_length, head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(backward) for _ in range(3))
    scale, mask = head_dim**-0.5, layout.dense_mask(device)
    forwards: dict[str, Callable[[], Tensor]] = {
        BASELINE: partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, scale=scale),
        **{name: partial(attend, q, k, v, layout, scale=scale, backend=name) for name in get_args(Backend)},
    }
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {name: {"backend": name} for name in forwards}
    expected = forwards[BASELINE]().detach()
    for name, forward in forwards.items():
        run = partial(with_backward, forward, (q, k, v)) if backward else forward
        try:
            difference = forward().detach() - expected
            run()
        except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
            rows[name]["reason"] = str(error).split("\n")[0]
            continue
        rows[name]["max_difference"] = difference.abs().max().item()
        runs[name] = run
    for name, seconds in measure_in_turn(runs, repeats=repeats, warmup=1, device=device).items():
        rows[name] |= {"median_seconds": median(seconds), "seconds": seconds}
    return list(rows.values())


def with_backward(forward: Callable[[], Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the sum of what `forward` returns."""
    return torch.autograd.grad(forward().sum(), inputs)


if __name__ == "__main__":
    main()
