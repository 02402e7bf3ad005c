"""A tiny tokenizer that reconstructs something, in memory and exported."""

import hydra
import pytest
import torch

from flextok.config import compose
from flextok.utils.export import export_model


@pytest.fixture(scope="session")
def config():
    return compose(["model=tiny", "vae=pixel", "data=digits"])


@pytest.fixture(scope="session")
def model(config):
    model = hydra.utils.instantiate(config.model, _convert_="all")
    # Freshly made heads are zero: every image would come out the same.
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="session")
def export(model, config, tmp_path_factory):
    return export_model(model, config.model, tmp_path_factory.mktemp("export"))
