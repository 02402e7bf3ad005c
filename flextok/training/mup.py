"""muP (arXiv 2203.03466): settings found at a small width hold at a large one."""

from copy import deepcopy

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from flextok.flextok_wrapper import FlexTok
from flextok.model.init import set_base_shapes

_WIDTHS = ("size.encoder_width", "size.decoder_width")


def start_with_mup(cfg: DictConfig, model: FlexTok) -> None:
    """Initialise a model anew by muP, for the base width `mup_base_width`; its optimizer then follows.

    At that width the weights are distributed as without muP. Which of a weight's sizes grow with the width is found
    by comparing the model with one of the base width, which takes no memory.
    """
    base = deepcopy(cfg)  # The caller's goes on being the config of the run.
    for field in _WIDTHS:
        OmegaConf.update(base, field, cfg.mup_base_width)
    for part in ("encoder", "decoder"):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            small = hydra.utils.instantiate(base.model[part], _convert_="all")
        set_base_shapes(getattr(model, part), small)
    model.init_weights_muP()
