"""What a new run starts from: all or most of the weights of another model, and which of them it trains."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from flextok.flextok_wrapper import FlexTok
from flextok.training.checkpoints import check_same_weights
from flextok.training.optim import belongs_to
from flextok.utils.checkpoint import load_safetensors

logger = logging.getLogger(__name__)

_OPTIONS = ("drop", "fresh", "freeze", "needs_weights")


def initialize_from(cfg: DictConfig, model: nn.Module) -> None:
    """`initialize_model` as a training config says: `init_from`, and the options under `initialize`, if there are any.

    `initialize.needs_weights` refuses a new run without `init_from`; a resumed one brings its weights.

    Raises ValueError for that, for an unknown option, and as `initialize_model`.
    """
    options: dict[Any, Any] = dict(OmegaConf.select(cfg, "initialize") or {})
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ValueError(f"initialize.{unknown[0]} is unknown; valid: {', '.join(_OPTIONS)}")
    if options.pop("needs_weights", False) and cfg.init_from is None and cfg.ckpt_path is None:
        raise ValueError(
            "init_from=None cannot be used: this experiment goes on from other weights; valid: a .safetensors file"
        )
    initialize_model(model, cfg.init_from, **{name: list(parts) for name, parts in options.items()})


def initialize_model(
    model: nn.Module,
    init_from: str | None,
    *,
    drop: Sequence[str] = (),
    fresh: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> None:
    """Load weights, then freeze parts; call it before anything looks at which parameters are trained.

    A part is the name of a weight or of a module above it, as in the file: `encoder`,
    `decoder.module_dict.dec_from_latents`. A resumed run gives no `init_from`, and freezes the same.

    Args:
        init_from: an exported or released `.safetensors` file, or None.
        drop: parts of the file that the model does not have.
        fresh: parts of the model that keep their own initial values, whatever the file says.
        freeze: parts that are not trained.

    Raises ValueError for a part that names nothing, and for weights that differ beyond `drop` and `fresh`.
    """
    if init_from is not None:
        load_weights(model, init_from, drop=drop, fresh=fresh)
    freeze_parts(model, freeze)


def load_weights(model: nn.Module, path: str, *, drop: Sequence[str] = (), fresh: Sequence[str] = ()) -> None:
    """Load the weights of a file, all but some parts; what stays out is logged. See `initialize_model`.

    Those of its VAE are left out too where the model keeps none in memory.
    """
    stored, own = load_safetensors(path, return_metadata=False), model.state_dict()
    if isinstance(model, FlexTok) and not model.vae.in_memory:
        stored = {name: tensor for name, tensor in stored.items() if not belongs_to(name, "vae")}
    dropped = _named(stored, drop, field="initialize.drop", of=f"init_from={path!r}")
    kept = _named(own, fresh, field="initialize.fresh", of="the model")
    both = sorted(set(dropped) & own.keys() - set(kept))
    if both:
        raise ValueError(
            f"initialize.drop={list(drop)} covers {both[0]}, which the model has; valid: initialize.fresh for weights "
            "that start anew"
        )
    loaded = {
        name: tensor for name, tensor in stored.items() if not any(belongs_to(name, part) for part in (*drop, *fresh))
    }
    check_same_weights(
        loaded,
        {name: tensor for name, tensor in own.items() if name not in kept},
        source=f"init_from={path!r}",
        valid="a file whose model, vae, dropout and size settings are those of this config, "
        "but for the parts in initialize.drop and initialize.fresh",
    )
    model.load_state_dict({**own, **loaded})
    logger.info("init_from=%s: %d weights loaded, %d dropped, %d new", path, len(loaded), len(dropped), len(kept))
    for what, names in (("dropped", dropped), ("new", kept)):
        for name in names:
            logger.info("%s: %s", what, name)


def freeze_parts(model: nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts from training; their modules still draw what training draws.

    Raises ValueError for a part without parameters, and if nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    frozen = _named(parameters, parts, field="initialize.freeze", of="the model")
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"initialize.freeze={list(parts)} leaves nothing to train; valid: fewer parts")
    if frozen:
        logger.info("%d parameters are frozen: all of %s", len(frozen), ", ".join(parts))


def _named(names: Iterable[str], parts: Sequence[str], *, field: str, of: str) -> list[str]:
    """The names that belong to any of the parts, each of which must have some."""
    names = list(names)
    for part in parts:
        if not any(belongs_to(name, part) for name in names):
            raise ValueError(
                f"{field} names {part!r}, but {of} has no such weights; valid: the name of a weight or of a module "
                "above it, such as encoder or decoder.module_dict.dec_from_latents"
            )
    return [name for name in names if any(belongs_to(name, part) for part in parts)]
