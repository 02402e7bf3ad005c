"""How many operators does a step call as the batch grows? `python -m benchmarks.operator_calls`

Counted are the calls of aten operators in a training step (forward, loss and backward: the optimizer does not depend on
the batch) and in a guided denoising step at an eighth of the registers; on a GPU also the kernels launched.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.candidates import CANDIDATES, Candidate, build_candidate, precision
from benchmarks.command import parse, parser, write
from benchmarks.decoding import GUIDANCE_SCALES, decode_batch
from benchmarks.harness import print_table
from benchmarks.workloads import WORKLOADS, Step, build_model, draw_decoding, draw_step

BATCHES = (1, 4, 16, 64)
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel")


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("operator_calls", __doc__, repeats=None)
    command.add_argument("--workload", choices=list(WORKLOADS), default="bench")
    command.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    options = parse(command, arguments)
    workload, device = WORKLOADS[options.workload], options.device
    drawing = build_model(workload, "mask_token", device)
    rows: list[dict[str, Any]] = []
    for name in CANDIDATES:
        trained = build_candidate(name, workload, device, training=True)
        decoded = build_candidate(name, workload, device, training=False)
        for batch in options.batches:
            step = draw_step(drawing, workload, batch=batch, seed=batch, device=device)
            quants, noise = draw_decoding(workload, batch=batch, device=device)
            keep_k = max(1, quants.shape[1] // 8)
            counted = {
                "training": calls(partial(train, trained, step), device),
                "decoding": calls(partial(decode_batch, decoded, quants, noise, GUIDANCE_SCALES[0], keep_k, 1), device),
            }
            counts = {f"{what}_{kind}": count for what, kinds in counted.items() for kind, count in kinds.items()}
            rows.append({"candidate": name, "batch": batch, **counts})
    print_table(rows)
    write(options, {"workload": options.workload, "rows": rows})


def calls(fn: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Operators called and, on a GPU, kernels launched, in the second call of `fn`: the first may set things up."""
    fn()
    with OperatorCounter() as counter:
        fn()
    if device.type != "cuda":
        return {"operators": counter.count}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fn()
        torch.cuda.synchronize(device)
    launches = sum(event.count for event in profiler.key_averages() if event.key.startswith(LAUNCHES))
    return {"operators": counter.count, "kernel_launches": launches}


class OperatorCounter(TorchDispatchMode):
    """Counts the aten operators that reach a backend, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def train(candidate: Candidate, step: Step) -> None:
    for parameter in candidate.parameters():
        parameter.grad = None
    with precision(step.latents.device):
        loss = candidate.loss(step)
    loss.backward()


if __name__ == "__main__":
    main()
