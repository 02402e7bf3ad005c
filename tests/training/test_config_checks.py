import pytest
import torch

from flextok.config import check_config, compose
from tests.training.support import small_config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.keep_ks=[1,5]", r"validation.keep_ks=\[1, 5\] .* valid: integers from 1 to 4"),
        ("validation.keep_ks=[0]", "valid: integers from 1 to 4"),
        ("validation.keep_ks=[]", "non-empty list"),
        ("validation.keep_ks=3", "non-empty list"),
        ("callbacks.pictures.keep_ks=[9]", "callbacks.pictures.keep_ks"),
        ("data.image_size=9", r"data.image_size=9 .* valid: a multiple of \d+ \(latent.downsample=1"),
        ("data.batch_size=0", "data.batch_size=0 .* at least 1"),
        ("trainer.precision=fp8", "trainer.precision='fp8' .* valid: 32-true, bf16-mixed"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1 .* needs to know its end"),
        ("optimizer.lr=2", "optimizer.lr=2 .* between 0 and 1"),
        ("ckpt_path=nowhere", "ckpt_path='nowhere' .* existing path"),
        ("init_from=nowhere.safetensors", "init_from='nowhere.safetensors' .* existing path"),
        ("init_from=pyproject.toml", "init_from='pyproject.toml' .* valid: a .safetensors file"),
        ("callbacks=[]", r"callbacks=.* a mapping"),
        ("callbacks.ema=true", "callbacks.ema=True .* valid: null"),
        ("+data.root=nowhere", "data.root='nowhere' .* existing path"),
        ("+model.vae.hf_hub_path=./nowhere", "model.vae.hf_hub_path='./nowhere' .* an existing folder"),
        ("+model.vae.hf_hub_path=/no/where", "an existing folder"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_valid(tmp_path, override, message):
    if override == "callbacks=[]":
        cfg = small_config(tmp_path)
        cfg.callbacks = []
    else:
        cfg = small_config(tmp_path, override)
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


@pytest.mark.parametrize(
    "override",
    [
        "validation.keep_ks=[1,4]",
        "callbacks.ema=null",
        "trainer.precision=bf16-mixed",
        "+model.vae.hf_hub_path=owner/name",
    ],
)
def test_valid_settings_pass(tmp_path, override):
    check_config(small_config(tmp_path, override))


def test_levels_of_start_weights_are_compared_before_anything_is_built(tmp_path):
    from flextok.utils.checkpoint import save_safetensors

    file = tmp_path / "start.safetensors"
    metadata = {"regularizer": {"_target_": "flextok.regularizers.quantize_fsq.FSQ", "levels": [8, 8, 5]}}
    save_safetensors({"x": torch.zeros(1)}, file, metadata)
    check_config(small_config(tmp_path, f"init_from={file}", "size.levels=[8,8,5]"))
    with pytest.raises(ValueError, match=r"levels \[8, 8, 5\], but .* is \[2, 2\]; .* size.levels=\[8,8,5\]"):
        check_config(small_config(tmp_path, f"init_from={file}", "size.levels=[2,2]"))


def test_weights_to_start_from_and_a_run_to_continue_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="init_from=.* null where ckpt_path is given"):
        check_config(small_config(tmp_path, f"init_from={tmp_path}", f"ckpt_path={tmp_path}"))


def test_sizes_that_do_not_divide_are_named():
    cfg = compose(["size.registers=${floordiv:7,2}"])
    with pytest.raises(Exception, match="floordiv:7,2"):
        _ = cfg.size.registers
