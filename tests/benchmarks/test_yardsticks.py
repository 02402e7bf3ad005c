"""Both yardsticks compute what our model in its mask-token form computes: else the comparison would mean nothing."""

import pytest
import torch
from torch import Tensor

from benchmarks.candidates import Ours
from benchmarks.workloads import build_model, draw_decoding, draw_step
from benchmarks.yardsticks.batched import Batched
from benchmarks.yardsticks.plain import Plain
from tests.benchmarks.support import CPU, MINIATURE
from tests.support import assert_close

BATCH, SEED = 6, 2
# One of each kind: what only one trunk, a modulation, a learned token or the head of the encoder contributes.
CHECKED = (
    "enc_register_module.registers",
    "enc_transformer.blocks.0.attn.wk.weight",
    "enc_to_latents.proj.weight",
    "dec_registers_posemb_module.posembs",
    "dec_nested_dropout.dropout_mask_token",
    "dec_latent_dropout.nullcond",
    "dec_transformer.blocks.1.mlp.fc2.weight",
    "dec_transformer.blocks.0.adaLN_modulation.1.weight",
    "dec_time_embedder.mlp.0.weight",
    "dec_to_patches.adaLN_modulation.1.bias",
)


@pytest.fixture(scope="module")
def model():
    return build_model(MINIATURE, "mask_token", CPU)


@pytest.fixture(scope="module")
def step(model):
    step = draw_step(model, MINIATURE, batch=BATCH, seed=SEED, device=CPU)
    assert any(step.null), "a sample should train the null condition"
    assert not all(step.null)
    return step


@pytest.mark.parametrize("form", ["mask_token", "attention_mask", "packed"])
def test_the_drawn_step_is_what_every_form_draws(form, step):
    model = build_model(MINIATURE, form, CPU)
    data = model(step.data(model))
    assert data["train_keep_k"] == step.keep_ks
    assert torch.equal(data["timesteps"], step.times)
    assert torch.equal(torch.cat(list(data["flow_noise"])), step.noise)


@pytest.mark.parametrize("yardstick", [Plain, Batched])
def test_velocity_loss_and_gradients_agree(yardstick, model, step):
    model.zero_grad()
    other = yardstick(model)
    data = model(step.data(model))
    assert_close(other.velocity(step), velocity_of(data), 1e-4, "velocity")
    expected = Ours(model).loss(step)
    expected.backward()
    loss = other.loss(step)
    loss.backward()
    assert_close(loss.detach(), expected.detach(), 1e-4, "loss")
    parameters = {name.split("module_dict.")[1]: p for name, p in model.named_parameters() if "module_dict." in name}
    for name in CHECKED:
        assert parameters[name].grad.abs().max() > 0, f"{name} has no gradient to compare"
        assert_close(other.weights[name].grad, parameters[name].grad, 1e-4, name)


@pytest.mark.parametrize("yardstick", [Plain, Batched])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_decoded_latents_agree(yardstick, guidance, model):
    quants, noise = draw_decoding(MINIATURE, batch=4, device=CPU)
    keep_ks, options = [1, 2, 7, 8], {"num_steps": 3, "guidance": guidance}
    other = yardstick(model).decode(quants, keep_ks, noise, **options)
    expected = Ours(model.eval()).decode(quants, keep_ks, noise, **options)
    model.train()
    assert_close(other, expected, 1e-4, "latents")


def velocity_of(data: dict) -> Tensor:
    return torch.cat(list(data["vae_latents_reconst"])).detach()
