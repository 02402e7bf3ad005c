import shutil

import pytest
import torch

from flextok.training.checkpoints import checkpoint_of_run, load_run
from tests.training.support import largest_difference, load


def test_a_run_gives_its_average_or_its_raw_weights(finished_run):
    checkpoint = load(finished_run)
    for weights, stored in (("ema", checkpoint["ema"]["weights"]), ("raw", checkpoint["state_dict"])):
        model, cfg = load_run(finished_run, weights=weights)
        assert not model.training
        assert cfg.size.registers == 4
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        assert largest_difference({name: state[name] for name in stored}, dict(stored)) == 0.0


def test_a_loaded_model_reconstructs(finished_run):
    model, _ = load_run(finished_run)
    tokens = model.tokenize(torch.zeros(2, 3, 8, 8))
    assert model.detokenize(tokens, vae_image_sizes=8, timesteps=1, verbose=False).shape == (2, 3, 8, 8)


def test_a_file_finds_the_config_of_its_run(finished_run, tmp_path):
    assert load_run(finished_run / "checkpoints" / "best.ckpt")[1].size.registers == 4
    alone = shutil.copy(finished_run / "checkpoints" / "last.ckpt", tmp_path)
    assert load_run(alone)[1].size.registers == 4  # from the copy it carries


def test_a_run_folder_means_what_was_written_regularly(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    assert checkpoint_of_run(tmp_path).name == "last.ckpt"
    (tmp_path / "checkpoints" / "last.ckpt").unlink()
    assert checkpoint_of_run(tmp_path).name == "previous.ckpt"
    (tmp_path / "checkpoints" / "previous.ckpt").unlink()
    assert checkpoint_of_run(tmp_path).name == "best.ckpt"
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(ValueError, match="no checkpoint; valid: a .ckpt file, or a run folder"):
        checkpoint_of_run(tmp_path)


def test_a_run_without_average_gives_its_only_weights_and_says_so(finished_run, tmp_path, caplog):
    checkpoint = load(finished_run)
    del checkpoint["ema"]
    torch.save(checkpoint, tmp_path / "last.ckpt")
    load_run(tmp_path / "last.ckpt", weights="ema")
    assert "without EMA" in caplog.text


def test_unknown_weights_are_refused(finished_run):
    with pytest.raises(ValueError, match="weights='average' cannot be used; valid: 'ema', 'raw'"):
        load_run(finished_run, weights="average")
