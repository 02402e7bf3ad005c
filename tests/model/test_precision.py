"""Models compute in bfloat16, whole or under autocast, and come out finite."""

import pytest
import torch
from hydra.utils import instantiate

from flextok.config import compose

FORMS = ["mask_token", "attention_mask", "packed"]


def small_model(form):
    sizes = ["size.encoder_depth=1", "size.decoder_depth=2", "size.registers=4"]
    config = compose(["data=digits", f"dropout={form}", *sizes])
    return instantiate(config.model, _convert_="all")


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_bfloat16_tokenizes_and_decodes(form):
    model = small_model(form).to(torch.bfloat16).eval()
    ids = model.tokenize(torch.rand(2, 3, 8, 8) * 2 - 1)
    images = model.detokenize(
        [i[:, :2] for i in ids], vae_image_sizes=8, timesteps=2, guidance_scale=3.0, verbose=False
    )
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_training_under_autocast_gives_finite_gradients(form):
    model = small_model(form).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        data = model({"rgb": (torch.rand(4, 3, 8, 8) * 2 - 1).split(1), "rng": torch.Generator().manual_seed(0)})
        velocity = data["vae_latents_reconst"].tensor
    velocity.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
