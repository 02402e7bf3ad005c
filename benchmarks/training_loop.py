"""What does the training loop cost beside the training, and how long does a step wait for data?

    python -m benchmarks.training_loop [--workload digits bench] [--repeats 5]

`overhead`: a run as `train.py` makes it (Lightning, all default callbacks, csv logger, checkpoints) takes turns with a
bare PyTorch loop, step by step, on the same batches with the same draws. The bare loop does what is training: forward,
backward, clipping, optimizer step, schedule and moving average. Fetching is part of neither, validation is left out.
Both end with the same weights. A round is as many steps as lie between two checkpoints, so that it holds one.

`waiting`: the same run alone, on latents computed in advance, and how much of its time goes into fetching batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig

from benchmarks.bare_loop import BareLoop, Seconds, Stopwatch
from benchmarks.command import parse, parser, write
from benchmarks.harness import print_table
from benchmarks.sample_data import write_latents
from flextok.config import compose
from flextok.training.run import run

WORKERS = (0, 2)
# On a terminal there would be a bar; nothing is drawn without validation.
_COMMON = (
    *("trainer.accelerator=cpu", "trainer.limit_val_batches=0", "+trainer.enable_model_summary=false"),
    *("callbacks.progress._target_=flextok.training.progress.ProgressLines", "vae=pixel"),
)


@dataclass(frozen=True)
class LoopWorkload:
    """A model to train, and on what."""

    overrides: tuple[str, ...]
    latents: tuple[int, int, int]
    """Shape of the latents that stand for its images."""
    num_latents: int
    steps: int
    """In a round of `overhead`, and from checkpoint to checkpoint; the default is 500."""
    reads_latents: bool = False
    """Whether it takes nothing but latents: there are no images of its kind."""


WORKLOADS = {
    "digits": LoopWorkload(("experiment=digits",), latents=(1, 8, 8), num_latents=1285, steps=500),
    # Checkpoints five times as often as by default: it costs more than it would.
    "bench": LoopWorkload(
        ("model=bench", "data.batch_size=16"), latents=(16, 16, 16), num_latents=1600, steps=100, reads_latents=True
    ),
}
WARM_UP = 20
WAITING_STEPS = 100
"""Steps in a round of `waiting`."""


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("training_loop", __doc__, repeats=5)
    command.add_argument("--workload", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    options = parse(command, arguments)
    overheads, waits = [], []
    for name in options.workload:
        with TemporaryDirectory() as folder:
            overheads.append({"workload": name, **overhead(WORKLOADS[name], options.repeats, Path(folder))})
        for workers in WORKERS:
            with TemporaryDirectory() as folder:
                row = waiting(WORKLOADS[name], workers, options.repeats, Path(folder))
                waits.append({"workload": name, **row})
    for rows in (overheads, waits):
        print_table([{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows])
    write(options, {"overhead": overheads, "waiting": waits})


def overhead(workload: LoopWorkload, rounds: int, folder: Path) -> dict[str, Any]:
    """A run and the bare loop in turn: `ratios` of their times round by round, and the median of these."""
    num_steps = WARM_UP + rounds * workload.steps + 1
    data = _latents(workload, folder, workers=0) if workload.reads_latents else ["data.num_workers=0"]
    cfg = _config(workload, folder, num_steps, data)
    bare = BareLoop(cfg)
    watch = Stopwatch(between=bare.step)
    with watch.watching():
        run(cfg)
    # The last step ends the run, and is no step like others.
    loop, other = (_in_rounds(times[WARM_UP:-1], workload.steps) for times in (watch.steps, watch.others))
    ratios = [_sum(a).wall / _sum(b).wall for a, b in zip(loop, other, strict=True)]
    cpu_ratios = [_sum(a).cpu / _sum(b).cpu for a, b in zip(loop, other, strict=True)]
    checkpoint = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return {
        "batch": cfg.data.batch_size,
        "parameters": sum(p.numel() for p in bare.parameters),
        "steps": workload.steps,
        "bare_step_seconds": median(step.wall for part in other for step in part),
        "loop_step_seconds": median(step.wall for part in loop for step in part),
        "ratio": median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "cpu_ratio": median(cpu_ratios),
        "ratio_of_typical_steps": median(
            a.wall / b.wall for x, y in zip(loop, other, strict=True) for a, b in zip(x, y, strict=True)
        ),
        "largest_difference_of_weights": bare.largest_difference(checkpoint["state_dict"]),
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
    }


def waiting(workload: LoopWorkload, workers: int, rounds: int, folder: Path) -> dict[str, Any]:
    """A run on latents: the share of its time that goes into fetching, round by round, and the median of these."""
    num_steps = WARM_UP + rounds * WAITING_STEPS + 1
    cfg = _config(workload, folder, num_steps, _latents(workload, folder, workers=workers))
    watch = Stopwatch()
    with watch.watching():
        run(cfg)
    steps, fetches = (_in_rounds(times[WARM_UP:-1], WAITING_STEPS) for times in (watch.steps, watch.fetches))
    shares = [_sum(b).wall / (_sum(a).wall + _sum(b).wall) for a, b in zip(steps, fetches, strict=True)]
    return {
        "workers": workers,
        "batch": cfg.data.batch_size,
        "step_seconds": median(step.wall for part in steps for step in part),
        "fetch_seconds": median(fetch.wall for part in fetches for fetch in part),
        "waiting_share": median(shares),
        "waiting_share_lowest": min(shares),
        "waiting_share_highest": max(shares),
        "waiting_shares": shares,
    }


def _config(workload: LoopWorkload, folder: Path, num_steps: int, data: Sequence[str]) -> DictConfig:
    checkpoints = f"callbacks.last.every_n_steps={workload.steps}"
    steps = f"trainer.max_steps={num_steps}"
    return compose([*_COMMON, *workload.overrides, *data, checkpoints, steps, f"paths.run={folder / 'run'}"])


def _latents(workload: LoopWorkload, folder: Path, *, workers: int) -> list[str]:
    made = write_latents(folder / "latents", shape=workload.latents, num_samples=workload.num_latents)
    return [*made, f"data.num_workers={workers}"]


def _in_rounds(times: Sequence[Seconds], length: int) -> list[Sequence[Seconds]]:
    return [times[start : start + length] for start in range(0, len(times), length)]


def _sum(times: Sequence[Seconds]) -> Seconds:
    return Seconds(sum(time.wall for time in times), sum(time.cpu for time in times))


if __name__ == "__main__":
    main()
