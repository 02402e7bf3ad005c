"""The configs of the official sizes build exactly the parameters recorded from the published code."""

import json

import pytest
import torch
from hydra.utils import instantiate

from flextok.config import compose
from tests.support import RECORDED

SIZES = json.loads((RECORDED / "official_shapes.json").read_text())
# A VAE of 16 latent channels; without a path its network is built untrained, so nothing is downloaded.
VAE = ["vae=kl", "latent.path=null"]


@pytest.mark.parametrize("size", SIZES)
def test_official_config_builds_the_recorded_parameters(size):
    overrides = [f"model={size}", "dropout=mask_token", "data=image_folder", "data.root=x", *VAE]
    config = compose(overrides)
    with torch.device("meta"):
        model = instantiate(config.model, _convert_="all")
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("vae.")}
    assert shapes == SIZES[size]["shapes"]
    num_parameters = {part: count(getattr(model, part)) for part in ("encoder", "decoder")}
    total = sum(count(m) for name, m in model.named_children() if name != "vae")
    assert num_parameters | {"total": total} == SIZES[size]["parameters"]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())
