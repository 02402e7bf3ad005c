"""Gradients that are not finite: the step is left out; too many in a row end the run, and nothing is lost."""

from types import SimpleNamespace

import pytest
import torch
from lightning import Callback

from flextok.training.nonfinite import NonFiniteGuard, _Pending
from flextok.training.run import run
from tests.training.support import largest_difference, load, run_with, small_config


class Spoil(Callback):
    """Makes one gradient not finite in some steps, and keeps the weights after each step."""

    def __init__(self, steps, value):
        self.steps, self.value, self.weights = steps, value, []

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            next(p for p in pl_module.parameters() if p.grad is not None).grad[0] = self.value

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def spoilt_run(cfg, steps, value=float("nan")):
    spoil = Spoil(steps, value)
    run_with(cfg, spoil)
    return spoil.weights


@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path, caplog, fused, value):
    weights = spoilt_run(small_config(tmp_path, f"optimizer.fused={fused}"), {3}, value)
    changes = [largest_difference(after, before) for before, after in zip(weights, weights[1:], strict=False)]
    assert [change == 0 for change in changes] == [False, False, True, False, False, False, False]
    assert "step 4: the gradient is not finite, the step is left out (1 in a row" in caplog.text
    saved = load(tmp_path)
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    moments = saved["optimizer_states"][0]["state"].values()
    assert all(moment["exp_avg_sq"].isfinite().all() for moment in moments)


def test_steps_are_counted_in_a_row(tmp_path):
    spoilt_run(small_config(tmp_path, "callbacks.nonfinite.max_in_a_row=2"), {1, 2, 4, 5})
    assert load(tmp_path)["global_step"] == 8


@pytest.mark.fault("NaN or infinity in the gradient")
def test_too_many_in_a_row_end_the_run_with_the_batch_and_the_weights_saved(tmp_path):
    cfg = small_config(tmp_path, "callbacks.nonfinite.max_in_a_row=2")
    with pytest.raises(
        ValueError, match=r"not finite in 3 steps in a row, up to step 7; the last batch is in .*_7_rank_0"
    ):
        spoilt_run(cfg, {4, 5, 6})
    batch = torch.load(tmp_path / "nonfinite_step_7_rank_0.pt", weights_only=True)
    assert batch["image"].shape == (400, 3, 8, 8)
    assert len(set(batch["key"])) == 400
    saved = load(tmp_path)
    assert saved["global_step"] == 7
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_the_count_survives_a_resume(tmp_path):
    cfg = small_config(
        tmp_path, "callbacks.nonfinite.max_in_a_row=2", "trainer.max_steps=5", "callbacks.last.every_n_steps=5"
    )
    spoilt_run(cfg, {3, 4})
    cfg.trainer.max_steps, cfg.ckpt_path = 8, str(tmp_path)
    with pytest.raises(ValueError, match="3 steps in a row, up to step 6"):
        spoilt_run(cfg, {5})


def test_a_negative_number_is_refused(tmp_path):
    with pytest.raises(Exception, match="max_in_a_row=-1: valid are 0 and above"):
        run(small_config(tmp_path, "callbacks.nonfinite.max_in_a_row=-1"))


def test_on_a_gpu_a_step_is_judged_when_the_one_after_the_next_starts(tmp_path):
    guard = NonFiniteGuard(folder=str(tmp_path), max_in_a_row=1)
    waited = []

    def start(step):
        guard.on_train_batch_start(None, None, None, step)
        event = SimpleNamespace(synchronize=lambda: waited.append(step))
        guard._pending.append(_Pending(step, torch.tensor(True), event))
        guard.on_train_batch_end(None, None, None, {"image": torch.zeros(1)}, step)

    for step in range(3):
        start(step)
        assert len(waited) == max(0, step - 1)
    with pytest.raises(ValueError, match="2 steps in a row, up to step 2"):
        guard.on_train_batch_start(SimpleNamespace(global_rank=0), None, None, 3)
    assert waited == [0, 1]
