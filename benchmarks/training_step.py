"""How fast is a training step, and how much memory does it need? `python -m benchmarks.training_step`

A step is zero_grad, forward, loss, backward and a fused AdamW step. On a CPU it computes in float32 and all candidates
run in turn; on a GPU under bfloat16 autocast, one candidate after another, since the largest size fits only once.
"""

import itertools
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import torch

from benchmarks import flops
from benchmarks.candidates import CANDIDATES, YARDSTICKS, Candidate, build_candidate, precision
from benchmarks.command import parse, parser, write
from benchmarks.harness import measure_in_turn, median_ratio, print_table
from benchmarks.observation import saved_bytes
from benchmarks.workloads import FORMS, WORKLOADS, Step, Workload, build_model, draw_step
from flextok.flextok_wrapper import FlexTok
from flextok.training import flops as formulas

NUM_DRAWS = 8
"""Steps of different `keep_k`, times and noise that are gone through again and again."""
DROPPING = ("attention_mask", "packed")
"""Forms whose decoder sees no dropped register."""
OFFICIAL = [name for name in WORKLOADS if name != "bench"]


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("training_step", __doc__, repeats=2 * NUM_DRAWS)
    command.add_argument("--workload", nargs="+", choices=list(WORKLOADS), help="bench on a CPU, the official on a GPU")
    command.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    command.add_argument("--batch", type=int, help="samples in a step, instead of the workload's own number")
    command.add_argument("--compile", action="store_true", help="compile the blocks of all but plain")
    options = parse(command, arguments)
    names = options.workload or (OFFICIAL if options.device.type == "cuda" else ["bench"])
    peak, source = flops.peak_flops(options.device)
    results = []
    for name in names:
        workload = WORKLOADS[name]
        batch = options.batch or workload.batch
        rows = measure_workload(
            workload,
            options.candidates,
            batch=batch,
            repeats=options.repeats,
            device=options.device,
            compiled=options.compile,
            peak=peak,
        )
        print(f"{name}, batch {batch}")
        print_table([table_row(row) for row in rows])
        print_table(ratios(rows))
        results.append({"workload": name, "batch": batch, "candidates": rows, "ratios": ratios(rows)})
    content = {"compiled": options.compile, "peak_flops": peak, "peak_flops_source": source, "workloads": results}
    write(options, content)


def measure_workload(
    workload: Workload,
    names: Sequence[str],
    *,
    batch: int,
    repeats: int,
    device: torch.device,
    compiled: bool,
    peak: float,
) -> list[dict[str, Any]]:
    """One row for each candidate in `names`."""
    drawing = build_model(workload, "mask_token", device)
    steps = [draw_step(drawing, workload, batch=batch, seed=seed, device=device) for seed in range(NUM_DRAWS)]
    operations = {name: step_flops(drawing, name, steps, num_patches=workload.num_patches(drawing)) for name in names}
    del drawing
    rows: list[dict[str, Any]] = []
    for together in [[name] for name in names] if device.type == "cuda" else [names]:
        built = {name: build_candidate(name, workload, device, training=True) for name in together}
        observed = {name: observe(candidate, steps, device) for name, candidate in built.items()}
        runs = {}
        for name, candidate in built.items():
            if compiled and name != "plain":
                candidate.compile_blocks()
            runs[name] = training_step(candidate, steps, device)
        seconds = measure_in_turn(runs, repeats=repeats, warmup=NUM_DRAWS if compiled else 2, device=device)
        for name, run in runs.items():
            timing = speed(seconds[name], batch, observed[name]["tokens"], operations[name], peak)
            memory = {"peak_memory_bytes": peak_memory(run, device)}
            rows.append({"candidate": name, **timing, **memory, **observed[name], "seconds": seconds[name]})
        # Nothing of them may be left when the next one is built.
        built.clear()
        runs.clear()
    return rows


def observe(candidate: Candidate, steps: Sequence[Step], device: torch.device) -> dict[str, Any]:
    """Means over the steps of the tokens in each trunk and of the bytes kept for backward, and the backends."""
    kept = []
    with candidate.observe() as observation:
        for step in steps:

            def forward(step: Step = step) -> torch.Tensor:
                with precision(device):
                    return candidate.loss(step)

            kept.append(saved_bytes(forward, candidate.parameters()))
    return {
        "saved_bytes": mean(kept),
        "tokens": {trunk: count / len(steps) for trunk, count in observation.tokens.items()},
        "backends": dict(observation.backends),
    }


def training_step(candidate: Candidate, steps: Sequence[Step], device: torch.device) -> Callable[[], None]:
    """A function that trains on the next of `steps` each time it is called."""
    optimizer = torch.optim.AdamW(candidate.parameters(), lr=1e-4, fused=True)
    endless = itertools.cycle(steps)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision(device):
            loss = candidate.loss(next(endless))
        loss.backward()
        optimizer.step()

    return run


def peak_memory(run: Callable[[], None], device: torch.device) -> int | None:
    """Most bytes allocated on the GPU during a step; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def speed(
    seconds: Sequence[float], batch: int, tokens: dict[str, float], operations: float, peak: float
) -> dict[str, float]:
    """What follows from the median time of a step."""
    step = median(seconds)
    return {
        "step_seconds": step,
        "images_per_second": batch / step,
        "tokens_per_second": sum(tokens.values()) / step,
        "mfu": operations / step / peak,
    }


def step_flops(model: FlexTok, name: str, steps: Sequence[Step], *, num_patches: int) -> float:
    """Mean over the steps of the operations that `name` has to do, see `flextok.training.flops`."""
    num_registers, batch = model.num_registers, len(steps[0].keep_ks)
    encoder = formulas.trunk_weights(model.encoder.module_dict["enc_transformer"])
    decoder = formulas.trunk_weights(model.decoder.module_dict["dec_transformer"])
    whole = [num_registers] * batch
    totals = []
    for step in steps:
        encoded = read_registers(step) if name in FORMS else whole
        pairs = sum(formulas.causal_last_pairs(num_patches, kept) for kept in encoded)
        tokens = len(encoded) * num_patches + sum(encoded)
        total = formulas.trunk_training_flops(**encoder, tokens=tokens, samples=batch, pairs=pairs)
        seen = step.keep_ks if name in DROPPING else whole
        pairs = formulas.full_pairs([num_patches + kept for kept in seen])
        tokens = batch * num_patches + sum(step.keep_ks if name == "packed" else whole)
        total += formulas.trunk_training_flops(**decoder, tokens=tokens, samples=batch, pairs=pairs)
        totals.append(total)
    return mean(totals)


def read_registers(step: Step) -> list[int]:
    """How many registers of each sample the decoder reads; samples of the null condition are none."""
    return [keep_k for keep_k, null in zip(step.keep_ks, step.null, strict=True) if not null or all(step.null)]


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How our forms compare with the yardsticks: times as often (in each round of the run), and bytes as a share."""
    found = {row["candidate"]: row for row in rows}
    return [
        {
            "candidate": form,
            "yardstick": yardstick,
            "times_faster": median_ratio(found[yardstick]["seconds"], found[form]["seconds"]),
            "share_of_saved_bytes": found[form]["saved_bytes"] / found[yardstick]["saved_bytes"],
        }
        for form in FORMS
        for yardstick in YARDSTICKS
        if form in found and yardstick in found
    ]


def table_row(row: dict[str, Any]) -> dict[str, Any]:
    """What is worth a column."""
    shown = {key: value for key, value in row.items() if key not in ("tokens", "backends", "seconds")}
    tokens = {f"{trunk}_tokens": count for trunk, count in row["tokens"].items()}
    return shown | tokens | {"backends": "+".join(row["backends"])}


if __name__ == "__main__":
    main()
