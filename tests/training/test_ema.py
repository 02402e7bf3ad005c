from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from torch import nn

from flextok.training.ema import ExponentialMovingAverage


class OneWeight(LightningModule):
    """A trained number and a frozen one."""

    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)

    def set(self, value):
        with torch.no_grad():
            self.weight.fill_(value)


def trained(ema, values, start=1.0):
    """A module after as many optimizer steps as there are values, and its trainer."""
    module, trainer = OneWeight(start), SimpleNamespace(global_step=0, log_every_n_steps=100)
    ema.on_fit_start(trainer, module)
    ema.on_train_start(trainer, module)
    for value in values:
        module.set(value)
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module, None, None, 0)
    return module, trainer


def test_the_average_follows_its_definition():
    ema = ExponentialMovingAverage(decay=0.75, warmup=False)
    trained(ema, [2.0, 4.0])
    assert ema.shadow["weight"].item() == pytest.approx(0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4)


def test_only_trained_parameters_are_copied():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    trained(ema, [2.0])
    assert list(ema.shadow) == ["weight"]


def test_warmup_forgets_the_start_quickly_and_ends_at_the_decay():
    ema = ExponentialMovingAverage(decay=0.5, warmup=True)
    decays = []
    for ema.num_updates in (0, 1, 8, 1000):
        decays.append(ema.current_decay())
    assert decays == pytest.approx([1 / 10, 2 / 11, 0.5, 0.5])


def test_an_accumulated_gradient_is_no_update():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    module, trainer = trained(ema, [2.0])
    module.set(100.0)
    ema.on_train_batch_end(trainer, module, None, None, 0)  # global_step did not move
    assert ema.num_updates == 1


def test_validation_sees_the_average_and_training_gets_its_weights_back():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    module, trainer = trained(ema, [3.0])
    storage = module.weight.data_ptr()
    with torch.inference_mode():
        ema.on_validation_start(trainer, module)
        assert module.weight.item() == 2.0
        ema.on_validation_end(trainer, module)
    assert module.weight.item() == 3.0
    assert module.weight.data_ptr() == storage
    assert not module.weight.is_inference()


def test_an_exception_in_validation_gives_the_weights_back():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    module, trainer = trained(ema, [3.0])
    with torch.inference_mode():
        ema.on_validation_start(trainer, module)
    ema.on_exception(trainer, module, RuntimeError())
    assert module.weight.item() == 3.0


def saved(ema, module, trainer):
    checkpoint = {"state_dict": module.state_dict()}
    ema.on_save_checkpoint(trainer, module, checkpoint)
    return checkpoint


def test_a_checkpoint_written_during_validation_holds_the_raw_weights():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    module, trainer = trained(ema, [3.0])
    ema.on_validation_start(trainer, module)
    checkpoint = saved(ema, module, trainer)
    assert checkpoint["state_dict"]["weight"].item() == 3.0
    assert checkpoint["ema"]["weights"]["weight"].item() == 2.0


def test_a_resumed_average_goes_on_where_it_was():
    full = ExponentialMovingAverage(decay=0.9, warmup=True)
    trained(full, [2.0, 3.0, 4.0])
    first, second = (ExponentialMovingAverage(decay=0.9, warmup=True) for _ in range(2))
    checkpoint = saved(first, *trained(first, [2.0]))
    second.on_load_checkpoint(None, None, checkpoint)
    trained(second, [3.0, 4.0], start=2.0)
    assert torch.equal(second.shadow["weight"], full.shadow["weight"])
    assert second.num_updates == 3


def test_starting_to_average_in_a_resumed_run_is_said(caplog):
    ema = ExponentialMovingAverage(decay=0.9, warmup=True)
    ema.on_load_checkpoint(None, None, {"state_dict": {}})
    assert "starts from its raw weights" in caplog.text


def test_another_decay_is_said(caplog):
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    checkpoint = saved(ema, *trained(ema, [2.0]))
    ExponentialMovingAverage(decay=0.9, warmup=False).on_load_checkpoint(None, None, checkpoint)
    assert "from 0.5 to 0.9" in caplog.text


def test_an_average_of_other_parameters_is_refused():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    ema.shadow = {"other": torch.zeros(1)}
    with pytest.raises(ValueError, match="other parameters than are trained now: 2 differ, such as other"):
        ema.on_fit_start(None, OneWeight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_average_is_float32_whatever_the_weights_are(dtype):
    ema, module = ExponentialMovingAverage(decay=0.999, warmup=False), OneWeight(1.0).to(dtype)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=100)
    ema.on_fit_start(trainer, module)
    ema.on_train_start(trainer, module)
    module.set(2.0)
    trainer.global_step = 1
    ema.on_train_batch_end(trainer, module, None, None, 0)
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == pytest.approx(1.001)
    ema.on_validation_start(trainer, module)
    assert module.weight.dtype == dtype
    ema.on_validation_end(trainer, module)
    assert module.weight.item() == 2.0


def test_the_average_is_no_view_of_the_weights():
    ema = ExponentialMovingAverage(decay=0.5, warmup=False)
    module, _ = trained(ema, [])
    module.set(9.0)
    assert ema.shadow["weight"].item() == 1.0
