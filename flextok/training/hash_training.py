"""Train hash projections for several numbers of bits, and say how many of the oracle's keys they find.

The result is a safetensors file per number of bits, for `HashAttentionTopKMasker`. A killed training goes on where its
last checkpoint was.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from flextok.attention.sparse import load_hat_weights, save_hat_weights
from flextok.training.hash_data import LayerQueries, Observed, data_sha256, num_sequences
from flextok.training.hash_module import HashModule
from flextok.training.hash_recall import draw_recall, random_projections, recall
from flextok.training.hash_settings import HashSettings

logger = logging.getLogger(__name__)

RECORD = "training.json"
RESULTS = "recall.json"
CHECKPOINT = "last.ckpt"


def train_hash(
    observed: Observed,
    folder: Path,
    settings: HashSettings,
    *,
    bits: Sequence[int],
    densities: Sequence[float],
    device: torch.device,
    save_every: int,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on three quarters of the sequences, or go on, and measure recall on the others.

    `folder` gets `hash_{bits}.safetensors`, `recall.json`, which is returned, and `recall.png`.

    Raises:
        ValueError: fewer than 2 sequences, bits or densities that are none, a folder with another training.
    """
    if num_sequences(observed) < 2:
        raise ValueError(f"{num_sequences(observed)} sequences; valid: 2 or more, of which some are held out")
    for number in bits:
        if number < 1:
            raise ValueError(f"bits={number}: it must be at least 1")
    for density in densities:
        if not 0 < density < 1:
            raise ValueError(f"density={density}: it must be above 0 and below 1")
    # The last ones: of a text a part of its own, of images other images.
    border = num_sequences(observed) - max(1, num_sequences(observed) // 4)
    seen, held_out = _part(observed, 0, border), _part(observed, border, None)
    _open(folder, {"settings": asdict(settings), "data_sha256": data_sha256(observed)})
    results = []
    for number in bits:
        path = folder / f"hash_{number}.safetensors"
        if not path.exists():
            _fit(HashModule(seen, number, settings), path, device, save_every=save_every, progress=progress)
        weights, untrained = load_hat_weights(path), random_projections(observed, number, settings.seed)
        for density in densities:
            learned = recall(held_out, weights, density, settings.activation)
            random = recall(held_out, untrained, density)
            row = {"bits": number, "density": density, "learned": _mean(learned), "random": _mean(random)}
            results.append({**row, "by_layer": {"learned": learned, "random": random}})
    report = {
        "protocol": {**asdict(settings), "sequences": border, "held_out": num_sequences(held_out)},
        "results": results,
    }
    (folder / RESULTS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw_recall(report).savefig(folder / "recall.png", dpi=110)
    return report


def _fit(module: HashModule, path: Path, device: torch.device, *, save_every: int, progress: bool) -> None:
    from lightning import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder = path.with_suffix("")
    saving = ModelCheckpoint(folder, every_n_train_steps=save_every, save_top_k=0, save_last=True)
    trainer = Trainer(
        max_epochs=1,
        max_steps=module.settings.steps,
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1 if device.index is None else [device.index],
        gradient_clip_val=1.0,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        logger.info("%s: goes on", checkpoint)
    # What a step sees follows from its number: the loader only counts.
    loader = DataLoader(_Forever(), batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    if trainer.interrupted or module.global_step < module.settings.steps:
        raise KeyboardInterrupt
    temporary = path.with_name(f".{path.name}.tmp")
    save_hat_weights(module.weights(), temporary)
    temporary.replace(path)
    checkpoint.unlink(missing_ok=True)
    folder.rmdir()


class _Forever(IterableDataset[int]):
    def __iter__(self) -> Any:
        while True:
            yield 0


def _part(observed: Observed, start: int, stop: int | None) -> Observed:
    return {
        layer: LayerQueries(x.queries[start:stop], x.keys[start:stop], x.allowed[start:stop])
        for layer, x in observed.items()
    }


def _mean(by_layer: dict[int, float]) -> float:
    return sum(by_layer.values()) / len(by_layer)


def _open(folder: Path, record: dict[str, Any]) -> None:
    """Make the folder, or check that it holds a training of the same kind."""
    path = folder / RECORD
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        mine, theirs = ({**of, **of["settings"]} for of in (record, found))
        different = [name for name in (*record["settings"], "data_sha256") if mine.get(name) != theirs.get(name)]
        if different:
            raise ValueError(f"{folder} holds a training with another {', '.join(different)}; valid: another folder")
        return
    if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise ValueError(f"{folder} holds files, but no {RECORD}; valid: a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
