"""A run that commands read, made without training."""

import pytest
import torch
from omegaconf import OmegaConf


@pytest.fixture
def run_folder(tmp_path):
    """What training leaves behind, reduced to what an export reads; the averaged weights are the raw ones plus 1."""
    from hydra.utils import instantiate

    from flextok.config import compose
    from flextok.training.ema import CHECKPOINT_KEY

    cfg = compose(["model=tiny", "vae=pixel", "data=digits", "dropout=attention_mask"])
    model_config = OmegaConf.to_container(cfg.model, resolve=True)
    state = {f"model.{name}": tensor for name, tensor in instantiate(model_config).state_dict().items()}
    averaged = {name: tensor + 1 for name, tensor in state.items() if tensor.is_floating_point()}
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"model": model_config}), run / "config.yaml")
    torch.save({"state_dict": state, CHECKPOINT_KEY: {"weights": averaged}}, run / "checkpoints" / "last.ckpt")
    return run


@pytest.fixture(scope="session")
def toy_questions(tmp_path_factory):
    """Overrides of the fuse config for a random model and five questions with one to three wordings."""
    pytest.importorskip("transformers")
    from tests.fusion.toy import ITEMS, save_toy, write_items

    folder = tmp_path_factory.mktemp("toy")
    items = write_items(folder / "items.jsonl", ITEMS)
    model = save_toy(folder / "model")
    return [
        *("fusion/data=jsonl", f"fusion.data.path={items}", "fusion.data.prompts.instruction=''"),
        *(f"fusion.model={model}", "fusion.device=cpu", "fusion.max_new_tokens=6", "fusion.num_paraphrases=3"),
        "fusion.batch_size=2",
    ]
