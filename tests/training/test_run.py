import json

import pytest
import torch
from omegaconf import OmegaConf

from flextok.config import check_config, compose
from flextok.training.initialize import load_weights
from flextok.training.run import build, run
from tests.training.support import SMALL, At, assert_same_result, largest_difference, load, rows, run_with, small_config


def fail():
    raise RuntimeError("stopped on purpose")


def run_and_stop(cfg, step, place):
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        run_with(cfg, At(step, place, fail))


def test_a_run_leaves_a_complete_folder(finished_run):
    info = json.loads((finished_run / "run_info.json").read_text())
    assert info["seed"] == 0
    assert info["packages"]["torch"]
    assert info["torch_threads"] >= 1
    config = OmegaConf.load(finished_run / "config.yaml")
    assert "${" not in (finished_run / "config.yaml").read_text()
    assert config.size.registers == 4
    assert {path.name for path in finished_run.glob("checkpoints/*")} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert {path.name for path in finished_run.glob("pictures/*")} == {"step_000004.png", "step_000008.png"}


def test_metrics_have_one_row_per_step(finished_run):
    metrics = rows(finished_run)
    assert [int(row["step"]) for row in metrics] == list(range(1, 9))
    names = {"train/loss", "train/lr", "train/grad_norm"}
    assert all(row[name] for row in metrics for name in names)
    validated = [row for row in metrics if row["val/flow_loss"]]
    assert [row["step"] for row in validated] == ["4", "8"]
    by_k = [float(validated[0][f"val/flow_loss_k{k}"]) for k in (1, 2, 4)]
    assert float(validated[0]["val/flow_loss"]) == pytest.approx(sum(by_k) / 3)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(finished_run, tmp_path):
    run(small_config(tmp_path / "same"))
    assert_same_result(tmp_path / "same", finished_run)
    assert rows(tmp_path / "same") == rows(finished_run)
    run(small_config(tmp_path / "other", "seed=1"))
    assert rows(tmp_path / "other") != rows(finished_run)


@pytest.mark.parametrize(
    ("step", "place"),
    [(2, "before"), (3, "within"), (4, "in validation"), (5, "after")],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished_run, tmp_path, step, place):
    cfg = small_config(tmp_path)
    run_and_stop(cfg, step, place)
    assert load(tmp_path)["global_step"] == step
    cfg.ckpt_path = str(tmp_path)
    run(cfg)
    assert_same_result(tmp_path, finished_run)


def test_half_an_update_is_not_saved(finished_run, tmp_path):
    cfg = small_config(tmp_path)
    run_and_stop(cfg, 4, "in the update")
    assert load(tmp_path)["global_step"] == 3  # the last regular one
    cfg.ckpt_path = str(tmp_path)
    run(cfg)
    assert_same_result(tmp_path, finished_run)


def test_a_resumed_run_appends_to_its_metrics(finished_run, tmp_path):
    cfg = small_config(tmp_path)
    run_and_stop(cfg, 3, "before")
    cfg.ckpt_path = str(tmp_path)
    run(cfg)
    assert rows(tmp_path) == rows(finished_run)


def test_the_best_checkpoint_can_be_continued_too(finished_run, tmp_path):
    best = finished_run / "checkpoints" / "best.ckpt"
    run(small_config(tmp_path, f"ckpt_path={best}", "trainer.max_steps=10"))
    assert load(tmp_path)["global_step"] == 10


def test_a_longer_run_is_the_continuation_of_a_shorter_one(finished_run, tmp_path):
    run(small_config(tmp_path / "short", "trainer.max_steps=4"))
    run(small_config(tmp_path / "rest", f"ckpt_path={tmp_path / 'short'}"))
    assert_same_result(tmp_path / "rest", finished_run)


def test_accumulated_gradients_resume_exactly(tmp_path):
    accumulate = ("trainer.accumulate_grad_batches=2", "trainer.max_steps=5", "callbacks.pictures=null")
    run(small_config(tmp_path / "full", *accumulate))
    run(small_config(tmp_path / "short", *accumulate, "trainer.max_steps=3"))
    run(small_config(tmp_path / "rest", *accumulate, f"ckpt_path={tmp_path / 'short'}"))
    assert_same_result(tmp_path / "rest", tmp_path / "full")


def test_validation_judges_the_average(finished_run, tmp_path):
    run(small_config(tmp_path, "callbacks.ema=null"))
    assert "ema" not in load(tmp_path)
    assert rows(tmp_path)[-1]["train/loss"] == rows(finished_run)[-1]["train/loss"]
    assert rows(tmp_path)[-1]["val/flow_loss"] != rows(finished_run)[-1]["val/flow_loss"]


def test_changes_of_a_resumed_run_are_said(finished_run, tmp_path, caplog):
    cfg = small_config(
        tmp_path, f"ckpt_path={finished_run}", "trainer.max_steps=9", "callbacks.ema=null", "optimizer.lr=0.5"
    )
    run(cfg)
    assert "optimizer.lr was 0.001, is now 0.5" in caplog.text
    assert "this run keeps none" in caplog.text


def test_steps_can_be_kept(tmp_path):
    run(small_config(tmp_path, "callbacks.last.keep_every_n_steps=4", "callbacks.best=null"))
    names = {path.name for path in tmp_path.glob("checkpoints/*")}
    assert names == {"last.ckpt", "previous.ckpt", "step_00000004.ckpt", "step_00000008.ckpt"}


def test_a_run_can_start_from_exported_weights(tmp_path):
    from flextok.utils.checkpoint import save_safetensors

    source = build(small_config(tmp_path, "seed=5")).module.model
    cfg = small_config(tmp_path, f"init_from={tmp_path / 'weights.safetensors'}")
    metadata = OmegaConf.to_container(cfg.model, resolve=True)
    save_safetensors(source.state_dict(), tmp_path / "weights.safetensors", metadata)
    model = build(cfg).module.model
    assert largest_difference(dict(model.state_dict()), dict(source.state_dict())) == 0.0


def test_weights_of_another_model_are_refused(small_model, tmp_path):
    from flextok.utils.checkpoint import save_safetensors

    state = dict(small_model.state_dict())
    removed = state.popitem()[0]
    save_safetensors(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"another model: 1 weights differ, such as {removed}"):
        load_weights(small_model, str(tmp_path / "other.safetensors"))


def test_compiled_modules_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", None))
    names = build(small_config(tmp_path, "compile=true")).module.state_dict().keys()
    assert names == build(small_config(tmp_path)).module.state_dict().keys()


def test_an_accelerator_that_is_not_there_is_named_with_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cfg = small_config(tmp_path, "trainer.accelerator=cuda")
    with pytest.raises(ValueError, match=r"^trainer.accelerator='cuda', .* valid .*: trainer=auto, trainer=cpu$"):
        build(cfg)


def test_a_run_without_callbacks_and_loggers_leaves_only_its_record(tmp_path):
    # An experiment sets options of callbacks, chosen or not.
    model = [override for override in SMALL if override.startswith(("size.", "data."))]
    limits = ["trainer.max_steps=2", "trainer.val_check_interval=2", "optimizer.warmup_steps=1"]
    cfg = compose(["experiment=digits", "trainer=cpu", "callbacks=none", "logger=none", *model, *limits])
    cfg.paths.run = str(tmp_path)
    check_config(cfg)
    run(cfg)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "run_info.json"}


def test_what_nobody_can_act_on_is_not_said(tmp_path, caplog, recwarn):
    run(small_config(tmp_path, "trainer.max_steps=4"))
    assert "litlogger" not in caplog.text
    assert not [warning for warning in recwarn if "LeafSpec" in str(warning.message)]
