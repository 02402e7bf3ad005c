"""Writes the report of an evaluation of six images by the stub."""

import torch

from flextok.evaluation.judges import build_judges
from flextok.evaluation.protocol import build_protocol
from flextok.evaluation.report import write_report
from tests.evaluation.stub import StubTokenizer, random_batches, run_sweep, settings_with


def write(folder, *, judges=None, keys=None, **options):
    batches = random_batches(6, 4)
    if keys:
        batches[0]["key"] = keys
    settings, device = settings_with(**options), torch.device("cpu")
    judges = judges or build_judges(settings, lambda: batches, device)
    sweep = run_sweep(StubTokenizer(), batches, settings, judges)
    weights = folder / "model <b>.safetensors"
    weights.parent.mkdir(exist_ok=True, parents=True)
    weights.write_bytes(b"abc")
    protocol = build_protocol(
        encoded=sweep.encoded,
        keep_ks=sorted({point.keep_k for point in sweep.points}),
        judges=judges,
        settings=settings,
        data={"_target_": "flextok.data.digits.DigitsDataModule"},
        checkpoint=weights,
        weights_file=weights,
        weights="as exported",
        device=device,
        model=StubTokenizer(),
        attention_backend="auto",
    )
    return write_report(sweep, protocol, folder / "out"), folder / "out" / "report.html"
