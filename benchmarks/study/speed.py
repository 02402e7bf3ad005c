"""Images per second and memory of every variant: training steps and decoding, the variants in turn."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from statistics import mean, median
from typing import Any

import hydra
import torch
from torch import Tensor

from benchmarks.bare_loop import BareLoop, Batch
from benchmarks.harness import measure_in_turn, median_ratio
from benchmarks.observation import saved_bytes
from benchmarks.study.plan import VARIANTS, DataSet, Run, Variant
from flextok.config import compose
from flextok.reconstruct import decode_tokens, encode_images

NUM_BATCHES = 8
"""Training batches that are gone through, each with draws of its own."""
DECODED = 64
"""Images decoded at a time."""
SAMPLING_STEPS = 5
CPU = torch.device("cpu")


def measure_speed(data: DataSet, *, repeats: int) -> list[dict[str, Any]]:
    """One row per variant; `times_faster` is against mask tokens with the same objective, round by round."""
    loops = {variant: BareLoop(_config(data, variant)) for variant in VARIANTS}
    batches = _batches(data)
    size = len(batches[0]["image"])
    seconds = measure_in_turn(
        {variant.name: partial(_next_step, loop, cycle(batches)) for variant, loop in loops.items()},
        repeats=repeats,
        warmup=NUM_BATCHES,
        device=CPU,
    )
    kept = {
        variant: mean(saved_bytes(partial(loop.loss, batch), loop.parameters) for batch in batches)
        for variant, loop in loops.items()
    }
    decoding = _decoding(loops, batches, repeats=max(1, repeats // 4))
    return [
        {
            "form": variant.form,
            "objective": variant.objective,
            "images_per_second": size / median(seconds[variant.name]),
            "times_faster": median_ratio(seconds[_baseline(variant)], seconds[variant.name]),
            "saved_mebibytes": kept[variant] / 2**20,
            "decoded_per_second": decoding[variant],
        }
        for variant in VARIANTS
    ]


def _decoding(loops: dict[Variant, BareLoop], batches: Sequence[Batch], *, repeats: int) -> dict[Variant, Any]:
    """Images per second at one token and at all of them; the objective changes nothing there."""
    images = torch.cat([batch["image"] for batch in batches])[:DECODED]
    fns: dict[str, Callable[[], Tensor]] = {}
    for variant, loop in loops.items():
        model = loop.model.eval()
        with torch.no_grad():
            encoded = encode_images(model, images, [str(number) for number in range(len(images))], seed=0)
        for keep_k in (1, model.num_registers):
            fns[f"{variant.name} {keep_k}"] = torch.no_grad()(
                partial(decode_tokens, model, encoded, keep_k=keep_k, seed=0, timesteps=SAMPLING_STEPS)
            )
    seconds = measure_in_turn(fns, repeats=repeats, warmup=1, device=CPU)
    found: dict[Variant, Any] = {variant: {} for variant in loops}
    for variant in loops:
        for name, times in seconds.items():
            label, _, kept = name.rpartition(" ")
            if label == variant.name:
                found[variant][kept] = len(images) / median(times)
    return found


def _batches(data: DataSet) -> list[Batch]:
    module = hydra.utils.instantiate(_config(data, VARIANTS[0]).data)
    module.setup("fit")
    return list(islice(module.train_dataloader(), NUM_BATCHES))


def _config(data: DataSet, variant: Variant) -> Any:
    overrides = [value for value in Run(data, variant, 0).training if value != "ckpt_path=auto"]
    return compose([*overrides, "paths.run=none"])


def _next_step(loop: BareLoop, batches: Any) -> None:
    loop.step(next(batches))


def _baseline(variant: Variant) -> str:
    return Variant("mask_token", variant.objective).name
