import pytest

from tests.training.support import small_config


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of 8 steps that nothing disturbed; tests only read it."""
    from flextok.training.run import run

    folder = tmp_path_factory.mktemp("finished_run")
    run(small_config(folder))
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A DINOv2 of one layer; patches of 4 pixels, made for a grid of 4 x 4."""
    import torch

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16
    )
    folder = tmp_path_factory.mktemp("teacher")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)


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
