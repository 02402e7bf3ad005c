"""Registers hidden from attention do not exist: same output as without them, no influence, no gradient."""

from functools import lru_cache

import pytest
import torch

from flextok.attention.engine import attend
from flextok.attention.layout import SequenceLayout
from flextok.model.layers.attention import FlexSelfAttention
from tests.support import max_difference, tiny_decoder

NUM_REGISTERS, QUANT_DIM, LATENT_CHANNELS = 16, 6, 4
MODES = ("full", "causal", "causal_last")
EQUAL, MIXED = ((8, 8),) * 4, ((8, 8), (4, 8), (6, 2), (2, 4))
BATCHES = [pytest.param(EQUAL[:n], id=f"{n}equal") for n in (1, 2, 3, 4)]
BATCHES += [pytest.param(MIXED[:n], id=f"{n}mixed") for n in (2, 3, 4)]
KEEP_KS = {
    "one": (1, 1, 1, 1),
    "two": (2, 2, 2, 2),
    "half": (8, 8, 8, 8),
    "all_but_one": (15, 15, 15, 15),
    "all": (16, 16, 16, 16),
    "different": (3, 16, 1, 9),
}

every_layout = pytest.mark.parametrize("mask_mode", MODES)
every_packer = pytest.mark.parametrize("drop_masked", [False, True], ids=["masked", "dropped"])
every_batch = pytest.mark.parametrize("sizes", BATCHES)
every_keep_k = pytest.mark.parametrize("keep_ks", KEEP_KS.values(), ids=KEEP_KS)

decoder_for = lru_cache(tiny_decoder)


def inputs_for(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "enc_registers_quant": [
            torch.randn(1, NUM_REGISTERS, QUANT_DIM, generator=generator) for _ in range(len(sizes))
        ],
        "vae_latents_noised": [torch.randn(1, LATENT_CHANNELS, h, w, generator=generator) for h, w in sizes],
        "timesteps": torch.rand(len(sizes), generator=generator),
    }


def decode(decoder, data, keep_ks=None, **extra):
    """Velocities and full-length register outputs of a call that leaves `data` as it is."""
    given = {} if keep_ks is None else {"eval_keep_k": list(keep_ks[: len(data["timesteps"])])}
    out = decoder({**data, **given, **extra})
    return list(out["vae_latents_reconst"]), list(out["dec_registers_proj"])


@every_layout
@every_packer
@every_batch
@every_keep_k
@torch.no_grad()
def test_values_of_dropped_registers_have_no_influence_at_all(mask_mode, drop_masked, sizes, keep_ks):
    decoder, data = decoder_for(mask_mode=mask_mode, drop_masked=drop_masked), inputs_for(sizes)
    changed = [q.clone() for q in data["enc_registers_quant"]]
    for quants, keep_k in zip(changed, keep_ks, strict=False):
        quants[:, keep_k:] = 1e3 * torch.randn_like(quants[:, keep_k:])
    before, registers_before = decode(decoder, data, keep_ks)
    after, registers_after = decode(decoder, {**data, "enc_registers_quant": changed}, keep_ks)
    for i, keep_k in enumerate(keep_ks[: len(sizes)]):
        assert torch.equal(before[i], after[i])
        assert torch.equal(registers_before[i][:, :keep_k], registers_after[i][:, :keep_k])


@every_layout
@every_packer
@every_batch
@every_keep_k
@torch.no_grad()
def test_hiding_registers_equals_cutting_them_off(mask_mode, drop_masked, sizes, keep_ks):
    decoder, data = decoder_for(mask_mode=mask_mode, drop_masked=drop_masked), inputs_for(sizes)
    cut = [q[:, :keep_k] for q, keep_k in zip(data["enc_registers_quant"], keep_ks, strict=False)]
    hidden, registers_hidden = decode(decoder, data, keep_ks)
    truncated, registers_truncated = decode(decoder, {**data, "enc_registers_quant": cut})
    for i, keep_k in enumerate(keep_ks[: len(sizes)]):
        assert max_difference(hidden[i], truncated[i]) < 1e-5
        assert registers_hidden[i].shape == (1, NUM_REGISTERS, registers_truncated[i].shape[-1])
        assert torch.isfinite(registers_hidden[i]).all()
        assert max_difference(registers_hidden[i][:, :keep_k], registers_truncated[i]) < 1e-5


@every_layout
@every_packer
@every_batch
@every_keep_k
def test_dropped_registers_receive_exactly_no_gradient(mask_mode, drop_masked, sizes, keep_ks):
    decoder, data = decoder_for(mask_mode=mask_mode, drop_masked=drop_masked), inputs_for(sizes)
    quants = [q.requires_grad_() for q in data["enc_registers_quant"]]
    velocities, registers = decode(decoder, data, keep_ks)
    kept = [r[:, :keep_k] for r, keep_k in zip(registers, keep_ks, strict=False)]
    loss = sum(x.square().sum() for x in [*velocities, *kept])
    parameters = dict(decoder.named_parameters())
    used = [name for name in parameters if "nullcond" not in name and parameters[name].requires_grad]
    gradients = torch.autograd.grad(loss, [*quants, *(parameters[name] for name in used)])
    for gradient, keep_k in zip(gradients[: len(quants)], keep_ks, strict=False):
        assert (gradient[:, keep_k:] == 0).all()
        assert (gradient[:, :keep_k] != 0).any(-1).all()
    for name, gradient in zip(used, gradients[len(quants) :], strict=True):
        assert torch.isfinite(gradient).all(), name


@torch.no_grad()
def test_the_number_of_kept_registers_matters():
    """Guards the other tests: with these weights the patches do look at the registers."""
    decoder, data = decoder_for(), inputs_for(EQUAL[:1])
    outputs = [decode(decoder, data, [k])[0][0] for k in (1, 2, 8, 15, 16)]
    assert all(max_difference(a, b) > 1e-3 for a, b in zip(outputs, outputs[1:], strict=False))


@every_packer
@every_batch
@torch.no_grad()
def test_without_keep_k_all_are_kept_and_a_stale_value_is_not_used(drop_masked, sizes):
    decoder, data = decoder_for(drop_masked=drop_masked), inputs_for(sizes)
    expected, _ = decode(decoder, data, [NUM_REGISTERS] * len(sizes))
    stale = {**data, "nested_dropout_keep_k": [1] * len(sizes)}
    decoder(stale)
    assert [min(k, NUM_REGISTERS) for k in stale["nested_dropout_keep_k"]] == [NUM_REGISTERS] * len(sizes)
    for velocity, wanted in zip(stale["vae_latents_reconst"], expected, strict=True):
        assert max_difference(velocity, wanted) < 1e-6


@every_packer
@torch.no_grad()
def test_a_dictionary_used_twice_gives_what_its_second_call_asks_for(drop_masked):
    decoder, data = decoder_for(drop_masked=drop_masked), inputs_for(MIXED)
    reused = decoder({**data, "eval_keep_k": [1, 2, 3, 4]})
    del reused["eval_keep_k"]
    again = list(decoder(reused)["vae_latents_reconst"])
    for velocity, wanted in zip(again, decode(decoder, data)[0], strict=True):
        assert max_difference(velocity, wanted) < 1e-6


@every_packer
@pytest.mark.parametrize("keep_k", [NUM_REGISTERS, NUM_REGISTERS + 1, 10_000])
@torch.no_grad()
def test_more_than_there_are_means_all(drop_masked, keep_k):
    decoder, data = decoder_for(drop_masked=drop_masked), inputs_for(MIXED[:2])
    for velocity, wanted in zip(decode(decoder, data, [keep_k, 3])[0], decode(decoder, data, [16, 3])[0], strict=True):
        assert max_difference(velocity, wanted) < 1e-6


@every_packer
@pytest.mark.parametrize("sizes", [pytest.param(EQUAL[:3], id="equal"), pytest.param(MIXED[:3], id="mixed")])
@torch.no_grad()
def test_null_condition_holds_per_sample_and_leaves_the_mask_alone(drop_masked, sizes):
    decoder, data, keep_ks = decoder_for(drop_masked=drop_masked), inputs_for(sizes), (2, 5, 16)
    flags = [True, False, True]
    together, _ = decode(decoder, data, keep_ks, eval_dropout_mask=flags)
    conditional, _ = decode(decoder, data, keep_ks)
    other_quants = {**data, "enc_registers_quant": inputs_for(sizes, seed=1)["enc_registers_quant"]}
    elsewhere, _ = decode(decoder, other_quants, keep_ks, eval_dropout_mask=flags)
    for i, flag in enumerate(flags):
        alone_data = {key: value[i : i + 1] for key, value in data.items()}
        alone, _ = decode(decoder, alone_data, keep_ks[i : i + 1], eval_dropout_mask=[flag])
        cut = {**alone_data, "enc_registers_quant": [alone_data["enc_registers_quant"][0][:, : keep_ks[i]]]}
        truncated, _ = decode(decoder, cut, eval_dropout_mask=[flag])
        assert max_difference(together[i], alone[0]) < 1e-5
        assert max_difference(together[i], truncated[0]) < 1e-5
        assert (max_difference(together[i], conditional[i]) > 1e-3) == flag
        assert (max_difference(together[i], elsewhere[i]) < 1e-6) == flag


@every_layout
def test_training_draws_one_keep_k_per_sample_from_the_generator_in_the_dictionary(mask_mode):
    decoder, sizes = tiny_decoder(mask_mode=mask_mode).train(), EQUAL * 8
    drawn = [
        decoder({**inputs_for(sizes), "rng": torch.Generator().manual_seed(seed)})["nested_dropout_keep_k"]
        for seed in (1, 1, 2)
    ]
    assert list(drawn[0]) == list(drawn[1]) != list(drawn[2])
    assert len(drawn[0]) == len(sizes)
    assert all(1 <= k <= NUM_REGISTERS for k in drawn[0])
    assert len(set(drawn[0])) > 4


def fully_masked_layouts():
    lengths, total = ((3, 4), (2, 4)), 16
    yield "layout", SequenceLayout(lengths, mode="full", keep_last=(0, 2), total=total)
    yield "causal layout", SequenceLayout(lengths, mode="causal", keep_last=(1, 0), total=total)
    yield "nothing kept", SequenceLayout(((0, 4), (0, 6)), mode="causal_last", keep_last=(0, 0), total=total)
    yield "dense", SequenceLayout(lengths, mode="full", keep_last=(0, 2), total=total).dense_mask()
    yield "dense empty", torch.zeros(total, total, dtype=torch.bool)
    yield "block mask", SequenceLayout(lengths, keep_last=(0, 2), total=total).block_mask(torch.device("cpu"))


@pytest.mark.parametrize("mask", [pytest.param(m, id=name.replace(" ", "_")) for name, m in fully_masked_layouts()])
def test_rows_without_a_visible_key_give_zeros_forward_and_backward(mask):
    dense = mask if isinstance(mask, torch.Tensor) else None
    if isinstance(mask, SequenceLayout):
        dense = mask.dense_mask()
    if dense is None:
        dense = SequenceLayout(((3, 4), (2, 4)), keep_last=(0, 2), total=16).dense_mask()
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, mask, scale=0.3)
    empty = ~dense.any(-1)
    assert empty.any()
    assert (out[:, :, empty] == 0).all()
    gradients = torch.autograd.grad(out.square().sum() + out.sum(), [q, k, v])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    unseen = ~dense.any(0)
    assert (gradients[0][:, :, empty] == 0).all()
    assert all((gradient[:, :, unseen] == 0).all() for gradient in gradients[1:])


def test_self_attention_layer_gives_zeros_for_fully_masked_rows():
    layer = FlexSelfAttention(dim=16, num_heads=2, qkv_bias=True, proj_bias=False)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2, :] = False
    out = layer(torch.randn(2, 6, 16), block_mask=mask)
    assert (out[:, 2] == 0).all()
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
