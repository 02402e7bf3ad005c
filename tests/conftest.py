"""Every test runs offline, seeded and on few threads; shape annotations of pure functions are checked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything imports these packages: a loaded module stays unchecked. `attention.masks` and
# `attention.backends.flex` are left out: FlexAttention counts the arguments of mask and score functions, and traces
# them; a checked function no longer shows the former and does not survive the latter.
BACKENDS = ("backends.dense", "backends.sdpa", "backends.varlen")
ATTENTION_MODULES = (*BACKENDS, "block_masks", "engine", "layout", "plan", "reference", "sparse", "visualize")
install_import_hook(
    [
        *(f"flextok.attention.{name}" for name in ATTENTION_MODULES),
        "flextok.flow_matching",
        "flextok.regularizers",
        "flextok.evaluation",
    ],
    "beartype.beartype",
)

from tests.support import RECORDED  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))
settings.register_profile("flextok", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("flextok")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def recorded_folder(monkeypatch):
    """The recorded files as working directory: their checkpoints name the VAE by a relative path."""
    monkeypatch.chdir(RECORDED)
    return RECORDED


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A DINOv2 of one layer; patches of 4 pixels, made for a grid of 4 x 4."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16
    )
    folder = tmp_path_factory.mktemp("teacher")
    transformers.Dinov2Model(config).save_pretrained(folder)
    return str(folder)
