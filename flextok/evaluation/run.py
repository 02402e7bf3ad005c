"""Evaluate one model on one split, from the config to the report."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from flextok.evaluation.device import pick_device
from flextok.evaluation.encoding import encode_split
from flextok.evaluation.grid import check_forms, make_grid
from flextok.evaluation.images import Batches
from flextok.evaluation.judges import build_judges
from flextok.evaluation.lengths import make_searches
from flextok.evaluation.points import PointStore, fingerprint
from flextok.evaluation.processes import joined_processes, of_first_process
from flextok.evaluation.protocol import build_protocol
from flextok.evaluation.report import write_report
from flextok.evaluation.settings import EvaluationSettings, resolve_keep_ks
from flextok.evaluation.source import ModelSource, find_source
from flextok.evaluation.sparse_sweep import attention_choices, attention_protocol, sparse_sweep
from flextok.evaluation.sweep import run_points
from flextok.model.sparse_attention import set_sparse_attention
from flextok.model.trunks.transformers import set_attention_backend

if TYPE_CHECKING:
    from flextok.data.datamodule import ImageDataModule

logger = logging.getLogger(__name__)


def run(config: DictConfig) -> tuple[dict[str, Any], Path]:
    """Evaluate as `configs/eval.yaml` says; returns the content of `metrics.json` and the folder it is in.

    Processes that `torchrun` started share the work, and all of them get the result.
    """
    options = _plain(config.evaluation)
    # The names of lists become the lists: everything that is wrong with one is known before a model or data is read.
    options["sparse"] = sparse_sweep(config.attention, options.get("sparse"), options.get("budgets"))
    settings = EvaluationSettings.from_mapping(options)
    with joined_processes(pick_device(settings.device, field="evaluation.device")) as device:
        return _run(config, settings, device)


def _run(config: DictConfig, settings: EvaluationSettings, device: torch.device) -> tuple[dict[str, Any], Path]:
    if OmegaConf.is_missing(config, "checkpoint") or not isinstance(config.checkpoint, str):
        raise ValueError("checkpoint: missing; give checkpoint=<run folder, .ckpt, .safetensors or latest>")
    source = find_source(config.checkpoint, runs=Path(config.paths.runs))
    data = data_config(_plain(config.get("data")), source, batch_size=settings.batch_size)
    check_image_size(data, source)
    folder = Path(config.output_dir) if config.output_dir else source.default_output_dir
    logger.info("evaluating %s on split %s", source.path, settings.split)

    model, weights = source.load(weights=settings.weights)
    keep_ks = resolve_keep_ks(settings.keep_ks, model.num_registers)
    check_forms(model, settings)
    set_attention_backend(model, config.attention.backend)
    for attention in attention_choices(config.attention, settings.sparse):
        # All are tried, so that one that does not fit this model is known before data is read; the last one stays.
        set_sparse_attention(model, attention)
    batches = open_split(data, settings.split)
    judges = build_judges(settings, lambda: batches, device)
    encoded = encode_split(model, batches, settings, device=device, judges=judges)
    protocol = build_protocol(
        encoded=encoded,
        keep_ks=keep_ks,
        judges=judges,
        settings=settings,
        data=data,
        checkpoint=source.path,
        weights_file=source.weights_file,
        weights=weights,
        model=model,
        device=device,
        attention_backend=config.attention.backend,
        attention=attention_protocol(config.attention),
    )
    store = PointStore(folder / "points", fingerprint(protocol, grid_images=settings.grid_images), encoded.keys)
    points = make_grid(settings, keep_ks)
    curves = list(dict.fromkeys(point.curve for point in points))
    searches = make_searches(settings.targets or (), curves, model.num_registers)
    sweep = run_points(model, encoded, batches, points, searches, settings, device=device, judges=judges, store=store)
    protocol["attention_backends"] = sweep.attention_backends
    return of_first_process(lambda: write_report(sweep, protocol, folder)), folder


def data_config(override: Mapping[str, Any] | None, source: ModelSource, *, batch_size: int) -> dict[str, Any]:
    """The data module to build: the chosen `data` group, else that of the run, changed by `+data.<name>=`."""
    data = dict(override or {})
    if "_target_" not in data:
        run_data = source.run_data()
        if run_data is None:
            raise ValueError(
                f"data=null: {source.path} belongs to no run, so its images are unknown; "
                "choose a data group, such as data=digits"
            )
        data = {**run_data, **data}
    return {**data, "eval_batch_size": batch_size}


def check_image_size(data: Mapping[str, Any], source: ModelSource) -> None:
    """Raise ValueError for images that the positions of a run's model do not reach."""
    if source.config is None:
        return
    fields = ("data.image_size", "latent.downsample", "size.patch")
    trained, downsample, patch = (_integer(source.config, field) for field in fields)
    size, step = data.get("image_size"), max(1, downsample * patch)
    if trained and isinstance(size, int) and not (0 < size <= trained and size % step == 0):
        smaller = f" or smaller multiples of {step}" if trained > step else ""
        raise ValueError(
            f"data.image_size={size} cannot be used; valid: {trained} (the size the model was trained at){smaller}"
        )


def _integer(node: Any, field: str) -> int:
    """A setting of a run's config, or 0."""
    for name in field.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if isinstance(node, int) and node > 0 else 0


def open_split(data: Mapping[str, Any], split: Literal["test", "val"]) -> Batches:
    """This process' batches of a split, built from the config of a data module."""
    datamodule: ImageDataModule = instantiate(data, _convert_="all")
    datamodule.setup("validate" if split == "val" else "test")
    return datamodule.whole_batches(split)


def _plain(node: Any) -> Any:
    return None if node is None else OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
