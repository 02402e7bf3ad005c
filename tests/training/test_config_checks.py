from typing import get_args

import pytest
import torch

from flextok.config import check_config, compose
from flextok.config_sizes import KEEP_K_SAMPLING
from flextok.model.keep_k import KeepKMode
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
        ("data.eval_batch_size=true", "data.eval_batch_size=True .* an integer"),
        ("trainer.precision=fp8", "trainer.precision='fp8' .* valid: 32-true, bf16-mixed"),
        ("trainer.precision=16-mixed", "optimizer.fused=True .* valid: false where trainer.precision=16-mixed"),
        ("callbacks.loss_buckets.num_times=0", "callbacks.loss_buckets.num_times=0 .* valid: .*1"),
        ("trainer.precision=bf16-true", "trainer.precision='bf16-true' .* valid: 32-true, bf16-mixed"),
        ("trainer.precision=64", "trainer.precision=64 "),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5 .* an integer of at least 1"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval=0 .* at least 1"),
        ("trainer.val_check_interval=0.5", "trainer.val_check_interval=0.5 .* at least 1"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0 .* at least 1"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 .* at least 1"),
        ("validation.num_sigmas=0", "validation.num_sigmas=0 .* at least 1"),
        ("callbacks.last.every_n_steps=0", "callbacks.last.every_n_steps=0 .* at least 1"),
        ("seed=-1", "seed=-1 .* an integer from 0 to 4294967295"),
        ("seed=4294967296", "seed=4294967296 .* from 0"),
        ("seed=one", "seed='one' .* from 0"),
        ("seed=null", "seed=None .* from 0"),
        ("optimizer.warmup_steps=8", r"optimizer.warmup_steps=8 .* 0 to 7"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps=-1 .* at least 0"),
        ("size.head_dim=24", "size.encoder_width=32 .* a multiple of size.head_dim=24"),
        ("size.decoder_width=48", "size.decoder_width=48 .* a multiple of size.head_dim=32"),
        ("size.intermediate_layer=2", r"size.intermediate_layer=2 .* 0 to 1 \(below size.decoder_depth=2\)"),
        ("size.intermediate_layer=-1", "size.intermediate_layer=-1 .* at least 0"),
        ("size.decoder_depth=0", "size.decoder_depth=0 .* at least 1"),
        ("size.keep_k_sampling=pow3", "size.keep_k_sampling='pow3' .* uniform, pow2, uniform_pow2"),
        ("size.levels=8", "size.levels=8 .* list of integers"),
        ("size.levels=[]", "size.levels=.* non-empty"),
        ("size.levels=[8,1]", r"size.levels=\[8, 1\] .* at least 2"),
        ("size.levels=[8.5]", "size.levels=.* integers"),
        ("trainer.max_steps=-1", "trainer.max_steps=-1 .* needs to know its end"),
        ("optimizer.lr=2", "optimizer.lr=2 .* between 0 and 1"),
        ("ckpt_path=nowhere", "ckpt_path='nowhere' .* existing path"),
        ("init_from=nowhere.safetensors", "init_from='nowhere.safetensors' .* existing path"),
        ("init_from=pyproject.toml", "init_from='pyproject.toml' .* valid: a .safetensors file"),
        ("callbacks=[]", r"callbacks=.* a mapping"),
        ("callbacks.ema=true", "callbacks.ema=True .* valid: null"),
        ("+data.root=nowhere", "data.root='nowhere' .* existing path"),
        ("+latent.path=./nowhere", "latent.path='./nowhere' .* the local folder of a diffusers"),
        ("+latent.path=/no/where", "the local folder of a diffusers"),
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
        "trainer.precision=32",
        "trainer.precision=bf16",
        "trainer.val_check_interval=1",
        "callbacks.last.keep_every_n_steps=null",
        "seed=4294967295",
        "size.intermediate_layer=1",
        "size.keep_k_sampling=pow2",
        "size.levels=[2]",
        "+latent.path=owner/name",
    ],
)
def test_valid_settings_pass(tmp_path, override):
    check_config(small_config(tmp_path, override))


def test_counts_may_be_written_with_an_exponent(tmp_path):
    cfg = small_config(tmp_path, "trainer.max_steps=1e4", "optimizer.total_steps=${trainer.max_steps}")
    cfg.trainer.val_check_interval = 1e3
    check_config(cfg)
    counts = (cfg.trainer.max_steps, cfg.optimizer.total_steps, cfg.trainer.val_check_interval)
    assert counts == (10_000, 10_000, 1000)
    assert all(type(count) is int for count in counts)


def test_what_a_model_leaves_open_is_named():
    with pytest.raises(ValueError, match=r"size.encoder_depth is missing; give size.encoder_depth=\.\.\."):
        check_config(compose(["model=flextok"]))


def test_a_single_block_has_no_layer_1():
    with pytest.raises(ValueError, match=r"size.intermediate_layer=1 .* valid: 0 \(below size.decoder_depth=1\)"):
        check_config(compose(["size.decoder_depth=1"]))


def test_widths_must_suit_the_position_tables(tmp_path):
    widths = ("size.head_dim=6", "size.encoder_width=12", "size.decoder_width=18")
    with pytest.raises(ValueError, match="size.decoder_width=18 .* a multiple of 4"):
        check_config(small_config(tmp_path, *widths))


@pytest.mark.parametrize(("num_registers", "is_valid"), [(1, True), (2, True), (3, False), (8, True), (9, False)])
def test_powers_of_two_need_a_power_of_two_of_registers(tmp_path, num_registers, is_valid):
    cfg = small_config(tmp_path, "size.keep_k_sampling=pow2", f"size.registers={num_registers}")
    if is_valid:
        check_config(cfg)
    else:
        with pytest.raises(ValueError, match=f"size.keep_k_sampling='pow2' .*size.registers={num_registers}"):
            check_config(cfg)


def test_the_ways_to_draw_keep_k_are_those_of_the_model():
    assert get_args(KeepKMode) == KEEP_K_SAMPLING


def test_levels_of_start_weights_are_compared_before_anything_is_built(tmp_path):
    from flextok.utils.checkpoint import save_safetensors

    file = tmp_path / "start.safetensors"
    metadata = {"regularizer": {"_target_": "flextok.regularizers.quantize_fsq.FSQ", "levels": [8, 8, 5]}}
    save_safetensors({"x": torch.zeros(1)}, file, metadata)
    check_config(small_config(tmp_path, f"init_from={file}", "size.levels=[8,8,5]"))
    with pytest.raises(ValueError, match=r"levels \[8, 8, 5\], but .* is \[2, 2\]; .* size.levels=\[8,8,5\]"):
        check_config(small_config(tmp_path, f"init_from={file}", "size.levels=[2,2]"))


def test_weights_to_start_from_and_a_run_to_continue_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="init_from=.* null where ckpt_path is a path"):
        check_config(small_config(tmp_path, f"init_from={tmp_path}", f"ckpt_path={tmp_path}"))


def test_sizes_that_do_not_divide_are_named():
    cfg = compose(["size.registers=${floordiv:7,2}"])
    with pytest.raises(Exception, match="floordiv:7,2"):
        _ = cfg.size.registers
