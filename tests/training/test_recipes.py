"""The experiments for models of the published sizes: what they compose into, and two steps of each, made tiny."""

import logging
from math import isfinite

import pytest
import torch
from omegaconf import OmegaConf

from flextok.cli import main
from flextok.cli.model_config import from_full_config
from flextok.cli.module_table import trace_modules
from flextok.config import CONFIG_FOLDER, check_config, compose
from flextok.training.initialize import freeze_parts, initialize_from, initialize_model, load_weights
from flextok.training.run import build
from flextok.utils.checkpoint import save_safetensors
from tests.support import randomize
from tests.training.support import SMALL

MASK_TOKEN = "decoder.module_dict.dec_nested_dropout.dropout_mask_token"
PROJECTIONS = ("encoder.module_dict.enc_to_latents", "decoder.module_dict.dec_from_latents")
# Parameters of encoder and decoder: the published ones, but for what a recipe changes.
ENCODER_D12, ENCODER_D18 = 85_382_406, 287_326_086
D12_D12 = ENCODER_D12, 257_830_726 - ENCODER_D12
RECIPES = {
    "imagenet_d12_d12": D12_D12,
    "imagenet_d18_d18": (ENCODER_D18, 865_913_542 - ENCODER_D18),
    "imagenet_d18_d28": (ENCODER_D18, 2_457_061_830 - ENCODER_D18),
    "finetune_official": D12_D12,
    "finetune_attention_mask": (D12_D12[0], D12_D12[1] - 768),  # no mask token
    # Four channels instead of six: two rows with their biases less, and two columns less.
    "change_fsq_levels": (D12_D12[0] - 2 * (768 + 1), D12_D12[1] - 2 * 768),
    "decoder_only": D12_D12,
}
TINY = (
    *(override for override in SMALL if not override.startswith(("callbacks", "optimizer", "trainer"))),
    *("latent.channels=3", "latent.downsample=1", "data.num_workers=0", "trainer=cpu", "trainer.devices=1"),
    *("trainer.precision=32-true", "trainer.accumulate_grad_batches=1", "trainer.max_steps=2"),
    *("trainer.val_check_interval=2", "trainer.limit_val_batches=1", "optimizer.warmup_steps=1", "logger=none"),
    *("callbacks.pictures=null", "callbacks.best=null", "callbacks.last=null"),
    "++initialize.needs_weights=false",
)


def tiny_config(folder, experiment, *overrides):
    cfg = compose([f"experiment={experiment}", *TINY, *overrides])
    OmegaConf.update(cfg, "paths.run", str(folder))
    check_config(cfg)
    return cfg


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model with a mask token as an exported file: its path and its weights."""
    folder = tmp_path_factory.mktemp("source")
    cfg = tiny_config(folder, "finetune_official", "seed=7")
    weights = randomize(build(cfg).module.model).state_dict()
    save_safetensors(weights, folder / "model.safetensors", OmegaConf.to_container(cfg.model, resolve=True))
    return str(folder / "model.safetensors"), {name: tensor.clone() for name, tensor in weights.items()}


def test_every_large_experiment_is_tried_here():
    large = {
        path.stem
        for path in (CONFIG_FOLDER / "experiment").glob("*.yaml")
        if compose([f"experiment={path.stem}"]).size.registers == 256
    }
    assert large == set(RECIPES)


@pytest.mark.parametrize("experiment", RECIPES)
def test_sizes_are_the_published_ones(experiment, caplog):
    rows = trace_modules(*from_full_config(compose([f"experiment={experiment}"])))
    counts = [sum(row.num_parameters or 0 for row in rows if row.part == part) for part in ("encoder", "decoder")]
    assert tuple(counts) == RECIPES[experiment]
    assert not caplog.records, "a module cannot compute shapes alone"


@pytest.mark.parametrize("experiment", [name for name in RECIPES if name.startswith("imagenet")])
def test_batches_and_steps_are_the_published_ones(experiment):
    cfg = compose([f"experiment={experiment}"])
    images = cfg.data.batch_size * cfg.trainer.devices * cfg.trainer.accumulate_grad_batches
    assert images == 2048
    assert cfg.trainer.max_steps == round(250e9 / (images * 256))


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=pytest.mark.slow) if "d18" in name else name for name in RECIPES],
)
def test_two_steps_train_what_a_recipe_trains(experiment, source, teacher_folder, tmp_path):
    path, weights = source
    is_new = experiment.startswith("imagenet")
    cfg = tiny_config(tmp_path, experiment, *([f"objective.repa.teacher={teacher_folder}"] if is_new else []))
    training = build(cfg)
    model = training.module.model
    cfg.init_from = None if is_new else path
    initialize_from(cfg, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, weights.get(name, torch.empty(0)))}
    expected = {name for name in before if experiment == "change_fsq_levels" and name.startswith(PROJECTIONS)}
    assert is_new or changed == expected

    training.trainer.fit(training.module, datamodule=training.data)
    assert training.trainer.global_step == 2
    metrics = {name: float(value) for name, value in training.trainer.callback_metrics.items()}
    assert all(isfinite(value) for value in metrics.values())
    assert ("train/repa" in metrics) == is_new
    trained = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("decoder.") for name in trained)
    assert any(name.startswith("encoder.") for name in trained) == (experiment != "decoder_only")
    assert (MASK_TOKEN in before) == (experiment != "finetune_attention_mask")
    (average,) = (callback for callback in training.trainer.callbacks if hasattr(callback, "shadow"))
    assert any(name.startswith("model.encoder.") for name in average.shadow) == (experiment != "decoder_only")
    assert not any("teacher" in name for name in [*average.shadow, *training.module.state_dict()])


def test_two_steps_on_latents_with_stored_features(teacher_folder, tmp_path):
    experiment, folder = "imagenet_d12_d12", tmp_path / "latents"
    images = [*TINY, "data.batch_size=16"]
    features = ["--features", teacher_folder, "--dtype", "fp32"]
    assert main(["--traceback", "latents", str(folder), f"experiment={experiment}", *images, *features]) == 0
    # Not the digits of TINY, nor the pixels of its images.
    small = [word for word in TINY if word != "data=digits"]
    cfg = compose(
        [
            f"experiment={experiment}",
            *small,
            "data=latents",
            f"data.root={folder}",
            "data.image_size=8",
            f"objective.repa.teacher={teacher_folder}",
            f"paths.run={tmp_path}",
        ]
    )
    check_config(cfg)
    training = build(cfg)
    assert training.module.objective.repa.teacher is None
    training.trainer.fit(training.module, datamodule=training.data)
    assert training.trainer.global_step == 2
    metrics = {name: float(value) for name, value in training.trainer.callback_metrics.items()}
    assert all(isfinite(value) for value in metrics.values())
    assert -1 <= metrics["train/repa"] < 0.5


# --- starting from other weights --------------------------------------------------------------------------------------


def other_model(folder, experiment):
    return build(tiny_config(folder, experiment)).module.model


def test_what_loads_and_what_does_not_is_logged(source, tmp_path, caplog):
    model = other_model(tmp_path, "finetune_attention_mask")
    with caplog.at_level(logging.INFO):
        load_weights(model, source[0], drop=[MASK_TOKEN], fresh=["encoder.module_dict.enc_to_latents.proj"])
    total = len(source[1])
    assert f"{total - 3} weights loaded, 1 dropped, 2 new" in caplog.text
    assert f"dropped: {MASK_TOKEN}" in caplog.text
    assert "new: encoder.module_dict.enc_to_latents.proj.weight" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, rf"another model: 1 weights differ, such as {MASK_TOKEN}; .* initialize.drop"),
        ({"drop": ["decoder.module_dict.dec_nested"]}, "initialize.drop names 'decoder.module_dict.dec_nested', but"),
        ({"drop": [MASK_TOKEN, "encoder"]}, "covers encoder.* which the model has; valid: initialize.fresh"),
        ({"drop": [MASK_TOKEN], "fresh": ["enc"]}, "initialize.fresh names 'enc', but the model has no such weights"),
        ({"drop": [MASK_TOKEN], "freeze": ["enc"]}, "initialize.freeze names 'enc', but the model has no such"),
    ],
)
def test_parts_that_do_not_fit_are_refused(source, tmp_path, options, message):
    model = other_model(tmp_path, "finetune_attention_mask")
    with pytest.raises(ValueError, match=message):
        initialize_model(model, source[0], **options)


def test_freezing_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"leaves nothing to train"):
        freeze_parts(other_model(tmp_path, "finetune_official"), ["encoder", "decoder"])


def test_without_options_nothing_is_frozen(tmp_path, caplog):
    model = other_model(tmp_path, "finetune_official")
    before = [p.requires_grad for p in model.parameters()]
    initialize_model(model, None)
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(record.name.endswith("initialize") for record in caplog.records)


@pytest.mark.parametrize("experiment", [name for name in RECIPES if not name.startswith("imagenet")])
def test_a_recipe_that_needs_weights_says_so(experiment, source, tmp_path):
    cfg = tiny_config(tmp_path, experiment)
    model = build(cfg).module.model
    cfg.initialize.needs_weights = True
    with pytest.raises(ValueError, match=r"init_from=None cannot be used: .* valid: a .safetensors file"):
        initialize_from(cfg, model)
    assert compose([f"experiment={experiment}"]).initialize.needs_weights
    cfg.ckpt_path = source[0]  # A resumed run brings its weights, and freezes the same.
    initialize_from(cfg, model)
    assert any(p.requires_grad for p in model.encoder.parameters()) == (experiment != "decoder_only")


def test_an_unknown_option_is_refused(tmp_path):
    cfg = tiny_config(tmp_path, "decoder_only", "+initialize.frieze=[encoder]")
    with pytest.raises(ValueError, match=r"initialize.frieze is unknown; valid: drop, fresh, freeze"):
        initialize_from(cfg, torch.nn.Linear(1, 1))
