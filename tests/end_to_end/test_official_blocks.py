"""Blocks of the official sizes at their full width: one of each trunk trains, and every size can be described."""

import pytest
import torch
from hydra.utils import instantiate

from flextok.cli import main
from flextok.config import compose
from tests.support import randomize

WIDTH, NUM_REGISTERS, NUM_PATCHES = 768, 256, 256
KEEP_KS = [1, 100]

pytestmark = pytest.mark.slow


def trunks_of_depth_one(dropout):
    overrides = ["model=flextok_d12_d12", f"dropout={dropout}", "vae=kl", "latent.path=null", "data.image_size=256"]
    one_block = ["size.encoder_depth=1", "size.decoder_depth=1", "size.intermediate_layer=0"]
    width = [f"size.encoder_width={WIDTH}", f"size.decoder_width={WIDTH}"]
    config = compose([*overrides, *one_block, *width]).model
    return [randomize(instantiate(config[part], _convert_="all")) for part in ("encoder", "decoder")]


def check_gradients(block):
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    assert gradients
    assert not [name for name, grad in gradients.items() if grad is None]
    assert not [name for name, grad in gradients.items() if not torch.isfinite(grad).all()]
    assert not [name for name, grad in gradients.items() if not grad.any()]


def test_an_encoder_block_trains_at_full_width():
    encoder, _ = trunks_of_depth_one("mask_token")
    (block,) = encoder.module_dict["enc_transformer"].blocks
    assert block.attn.num_heads == 12
    encoder.module_dict["enc_dropout_sampler"].null_prob = 0.0
    latents = [latent.requires_grad_() for latent in torch.randn(2, 16, 32, 32).split(1)]
    data = encoder({"vae_latents": latents})
    layout = data["enc_block_mask"]
    assert layout.mode == "causal_last"
    assert [list(row) for row in layout.lengths] == [[NUM_PATCHES, keep_k] for keep_k in data["sampled_keep_k"]]
    registers = torch.cat(list(data["enc_registers"]))
    assert registers.shape == (2, NUM_REGISTERS, 6)
    assert torch.isfinite(registers).all()
    registers.square().mean().backward()
    check_gradients(block)


@pytest.mark.parametrize("dropout", ["mask_token", "attention_mask", "packed"])
def test_a_decoder_block_trains_at_full_width(dropout):
    _, decoder = trunks_of_depth_one(dropout)
    (block,) = decoder.eval().module_dict["dec_transformer"].blocks
    assert block.attn.num_heads == 12
    assert block.adaLN_modulation[1].weight.shape == (2 * 6 * WIDTH, WIDTH)
    quants = torch.randn(2, NUM_REGISTERS, 6, requires_grad=True)
    data = decoder(
        {
            "enc_registers_quant": quants.split(1),
            "eval_keep_k": KEEP_KS,
            "vae_latents_noised": torch.randn(2, 16, 32, 32).split(1),
            "timesteps": torch.tensor([0.2, 0.9]),
        }
    )
    velocity = torch.cat(list(data["vae_latents_reconst"]))
    assert velocity.shape == (2, 16, 32, 32)
    assert torch.isfinite(velocity).all()
    velocity.square().mean().backward()
    check_gradients(block)
    for gradient, keep_k in zip(quants.grad, KEEP_KS, strict=True):
        assert gradient[:keep_k].any(-1).all(), "a kept token has no influence"
        assert not gradient[keep_k:].any(), "a dropped token has influence"


@pytest.mark.parametrize("dropout", ["mask_token", "attention_mask"])
@pytest.mark.parametrize("model", ["flextok_d12_d12", "flextok_d18_d18", "flextok_d18_d28"])
def test_official_sizes_are_described(model, dropout, capsys, caplog):
    assert main(["describe", f"model={model}", f"dropout={dropout}", "vae=kl", "data.image_size=256"]) == 0
    table = capsys.readouterr().out
    assert not caplog.records, "a module cannot compute shapes alone"
    rows = {line.split()[0]: line for line in table.splitlines() if line[:1].strip()}
    assert "[1, 256, 6]" in rows["enc_to_latents"]
    assert "[1, 16, 32, 32]" in rows["dec_channels_to_first"]
    assert ("AttentionMaskedNestedDropout" in table) == (dropout == "attention_mask")
