import pytest

from tests.training.support import small_config


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of 8 steps that nothing disturbed; tests only read it."""
    from flextok.training.run import run

    folder = tmp_path_factory.mktemp("finished_run")
    run(small_config(folder))
    return folder


@pytest.fixture
def small_model(tmp_path):
    import hydra
    import torch

    torch.manual_seed(0)
    model = hydra.utils.instantiate(small_config(tmp_path).model, _convert_="all")
    for parameter in model.parameters():  # Heads start at zero, which would hide most mistakes.
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model
