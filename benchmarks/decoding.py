"""Does decoding get faster the fewer tokens are kept, with and without guidance? `python -m benchmarks.decoding`

Noise is decoded to latents, in 20 steps; no VAE runs. `packed` is ours without a mask token, `mask_token` ours with a
checkpoint in the published format. Both yardsticks do the same work for every `keep_k`, so they are timed once a round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import YARDSTICKS, Candidate, build_candidate, precision
from benchmarks.command import parse, parser, write
from benchmarks.harness import measure_in_turn, median_ratio, print_table
from benchmarks.observation import Observation
from benchmarks.workloads import WORKLOADS, Workload, draw_decoding

SMALL_KEEP_KS, KEEP_KS = (1, 4, 8, 16, 32, 64), (1, 8, 32, 128, 256)
"""What is measured with up to 64 registers, and with more."""
GUIDANCE_SCALES = (3.0, 1.0)
"""With guidance and, at 1, without."""
OURS = ("packed", "mask_token")


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("decoding", __doc__, repeats=3)
    command.add_argument("--workload", choices=list(WORKLOADS), help="bench on a CPU, flextok_d18_d28 on a GPU")
    command.add_argument("--batch", type=int, help="images at once, instead of the workload's own number")
    command.add_argument("--steps", type=int, default=20, help="denoising steps, default 20")
    command.add_argument("--compile", action="store_true", help="compile the blocks of all but plain")
    options = parse(command, arguments)
    on_gpu = options.device.type == "cuda"
    name = options.workload or ("flextok_d18_d28" if on_gpu else "bench")
    batch = options.batch or WORKLOADS[name].batch
    candidates = [*OURS, *YARDSTICKS]
    rows: list[dict[str, Any]] = []
    # On a GPU one after another: the largest size fits only once.
    for together in [[candidate] for candidate in candidates] if on_gpu else [candidates]:
        rows += measure_together(
            WORKLOADS[name],
            together,
            batch=batch,
            num_steps=options.steps,
            repeats=options.repeats,
            device=options.device,
            compiled=options.compile,
        )
    add_ratios(rows)
    print(f"{name}, batch {batch}, {options.steps} steps")
    print_table([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    settings = {"workload": name, "batch": batch, "steps": options.steps, "compiled": options.compile}
    write(options, {**settings, "rows": rows})


@dataclass
class Case:
    """One thing to time."""

    candidate: str
    guidance: float
    keep_k: int
    decode: Callable[[int], Tensor]
    """Decodes the batch in a number of steps."""
    observed: Observation


def measure_together(
    workload: Workload,
    names: Sequence[str],
    *,
    batch: int,
    num_steps: int,
    repeats: int,
    device: torch.device,
    compiled: bool,
) -> list[dict[str, Any]]:
    """One row for each guidance scale, candidate and, for ours, `keep_k`."""
    built = {name: build_candidate(name, workload, device, training=False) for name in names}
    quants, noise = draw_decoding(workload, batch=batch, device=device)
    num_registers = quants.shape[1]
    keep_ks = [k for k in (SMALL_KEEP_KS if num_registers <= 64 else KEEP_KS) if k <= num_registers]
    cases = []
    for guidance in GUIDANCE_SCALES:
        for name, candidate in built.items():
            for keep_k in keep_ks if name in OURS else keep_ks[-1:]:
                decode = partial(decode_batch, candidate, quants, noise, guidance, keep_k)
                with candidate.observe() as observed:
                    decode(1)
                cases.append(Case(name, guidance, keep_k, decode, observed))
    if compiled:
        for name in set(names) - {"plain"}:
            built[name].compile_blocks()
    for case in cases:
        case.decode(2)
    runs = {str(index): partial(case.decode, num_steps) for index, case in enumerate(cases)}
    seconds = measure_in_turn(runs, repeats=repeats, warmup=0, device=device)
    return [result(case, seconds[str(index)], batch) for index, case in enumerate(cases)]


def decode_batch(
    candidate: Candidate, quants: Tensor, noise: Tensor, guidance: float, keep_k: int, num_steps: int
) -> Tensor:
    """Latents decoded from the first `keep_k` quants of every sample."""
    with precision(noise.device):
        return candidate.decode(quants, [keep_k] * len(noise), noise, num_steps=num_steps, guidance=guidance)


def result(case: Case, seconds: list[float], batch: int) -> dict[str, Any]:
    """A row, without the comparisons."""
    return {
        "candidate": case.candidate,
        "guidance": case.guidance,
        "keep_k": case.keep_k,
        "images_per_second": batch / median(seconds),
        "tokens_per_step": case.observed.tokens["decoder"],
        "backends": "+".join(case.observed.backends),
        "seconds": seconds,
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to our rows how many times faster than each yardstick they are, and whether time falls with tokens.

    `time_over_tokens` is the time relative to that of all registers, divided by the tokens relative to theirs: 1 if
    both fall alike, more if time falls less.
    """
    for row in rows:
        if row["candidate"] not in OURS:
            continue
        same = [other for other in rows if other["guidance"] == row["guidance"]]
        for yardstick in YARDSTICKS:
            (other,) = (other for other in same if other["candidate"] == yardstick)
            row[f"times_faster_than_{yardstick}"] = median_ratio(other["seconds"], row["seconds"])
        full = max((o for o in same if o["candidate"] == row["candidate"]), key=lambda other: other["keep_k"])
        share_of_tokens = row["tokens_per_step"] / full["tokens_per_step"]
        row["time_over_tokens"] = median_ratio(row["seconds"], full["seconds"]) / share_of_tokens


if __name__ == "__main__":
    main()
