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


def scaled_groups(model, **lr_scales):
    return parameter_groups(model.named_parameters(prefix="model"), weight_decay=0.5, lr=0.1, lr_scales=lr_scales)


def test_parts_learn_at_their_own_rates(small_model):
    head = "decoder.module_dict.dec_from_latents"
    groups = scaled_groups(small_model, **{"decoder": 0.5, head: 2.0})
    assert [group.get("lr") for group in groups] == [None, None, 0.05, 0.05, 0.2, 0.2]
    names = {id(p): name for name, p in small_model.named_parameters()}
    by_group = [{names[id(p)] for p in group["params"]} for group in groups]
    assert by_group[4:] == [{f"{head}.proj.weight"}, {f"{head}.proj.bias"}]
    assert all(name.startswith("encoder.") for name in by_group[0] | by_group[1])
    assert all(name.startswith("decoder.") for name in by_group[2] | by_group[3])
    trained = {name for name, p in small_model.named_parameters() if p.requires_grad}
    assert set().union(*by_group) == trained
    assert sum(map(len, by_group)) == len(trained)


def test_the_schedule_keeps_the_ratio_of_the_rates(small_model):
    built = adamw_with_cosine(small_model, **OPTIONS, lr_scales={"encoder": 0.1})
    for _ in range(3):
        rates = [group["lr"] for group in built["optimizer"].param_groups]
        assert rates[2:] == pytest.approx([0.1 * rates[0]] * 2)
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()


def test_a_rate_for_nothing_is_refused(small_model):
    with pytest.raises(ValueError, match=r"lr_scales names 'enc', of which nothing is trained; valid: encoder"):
        scaled_groups(small_model, enc=0.1)
    small_model.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"lr_scales names 'encoder', of which nothing is trained"):
        scaled_groups(small_model, encoder=0.1)


def test_a_rate_that_is_not_positive_is_refused(small_model):
    with pytest.raises(ValueError, match=r"optimizer.lr_scales.encoder=0 cannot be used; valid: a positive number"):
        scaled_groups(small_model, encoder=0)
