import pytest
import torch
from torch import nn

from flextok.training.optim import adamw_with_cosine, parameter_groups, warmup_cosine

OPTIONS = {"lr": 0.1, "weight_decay": 0.5, "warmup_steps": 2, "total_steps": 10, "floor": 0.1}


def test_only_matrices_decay(small_model):
    decay, no_decay = parameter_groups(small_model.named_parameters(), weight_decay=0.5)
    names = {id(p): name for name, p in small_model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    kept = {names[id(p)] for p in no_decay["params"]}
    assert decayed
    assert all(name.endswith("weight") for name in decayed)
    for end in ("registers", "posembs", "dropout_mask_token", "nullcond", "bias"):
        assert any(name.endswith(end) for name in kept)
    assert decayed | kept == {name for name, p in small_model.named_parameters() if p.requires_grad}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.5, 0.0)


def test_frozen_parameters_are_left_out():
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    decay, no_decay = parameter_groups(module.named_parameters(), weight_decay=0.5)
    assert decay["params"] == []
    assert no_decay["params"] == [module.bias]


def test_the_rate_warms_up_peaks_and_ends_at_the_floor():
    factors = [warmup_cosine(step, warmup_steps=2, total_steps=10, floor=0.1) for step in range(12)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[6] == pytest.approx(0.55)  # half way along the cosine
    assert factors[10:] == pytest.approx([0.1, 0.1])
    assert factors[2:11] == sorted(factors[2:11], reverse=True)


def test_without_warmup_the_first_step_is_the_largest():
    assert warmup_cosine(0, warmup_steps=0, total_steps=1, floor=0.0) == 1.0


def test_the_first_step_uses_the_schedule():
    built = adamw_with_cosine(nn.Linear(2, 2), **OPTIONS, betas=[0.9, 0.99])
    assert built["optimizer"].param_groups[0]["lr"] == pytest.approx(0.1 / 3)
    assert built["optimizer"].param_groups[0]["betas"] == (0.9, 0.99)


def test_a_schedule_that_only_warms_up_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps=10 .* valid: 0 to 9"):
        adamw_with_cosine(nn.Linear(2, 2), **{**OPTIONS, "warmup_steps": 10})


def test_decay_pulls_matrices_and_leaves_biases():
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(1.0)
    optimizer = adamw_with_cosine(module, **{**OPTIONS, "warmup_steps": 0})["optimizer"]
    (module.weight.sum() * 0 + module.bias.sum() * 0).backward()
    optimizer.step()
    torch.testing.assert_close(module.weight, torch.full((2, 2), 1 - 0.1 * 0.5))
    torch.testing.assert_close(module.bias, torch.ones(2))
