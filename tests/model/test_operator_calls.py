"""Operators called per step do not grow with the batch: nothing loops over samples."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import FORMS, small_tokenizer

SMALL, LARGE, MOST = 4, 64, 1.2

every_form = pytest.mark.parametrize("form", FORMS)


class Calls(TorchDispatchMode):
    """Counts operators that reach a backend, those of the backward pass included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls(fn):
    fn()
    with Calls() as counter:
        fn()
    return counter.count


def step_of_training(model, batch):
    data = {"vae_latents": list(torch.randn(batch, 3, 8, 8).split(1)), "rng": torch.Generator().manual_seed(batch)}

    def step():
        model.zero_grad()
        model(dict(data))["vae_latents_reconst"].tensor.square().mean().backward()

    return step


@every_form
def test_a_training_step(form):
    model = small_tokenizer(form).train()
    few, many = (calls(step_of_training(model, batch)) for batch in (SMALL, LARGE))
    assert many <= MOST * few, f"{few} for {SMALL} samples, {many} for {LARGE}"


def step_of_decoding(model, batch, num_steps):
    generator = torch.Generator().manual_seed(batch)
    data = {
        "enc_registers_quant": list(torch.randn(batch, 16, 6, generator=generator).split(1)),
        "eval_keep_k": torch.randint(1, 17, (batch,), generator=generator).tolist(),
    }
    options = {"timesteps": num_steps, "vae_image_sizes": 8, "guidance_scale": 3.0, "verbose": False}
    return lambda: model.pipeline(dict(data), **options)


@every_form
def test_a_guided_step_of_decoding(form):
    """Of two steps and one the difference, so that drawing the noise sample by sample is left out."""
    model = small_tokenizer(form).eval()
    few, many = (
        calls(step_of_decoding(model, batch, 2)) - calls(step_of_decoding(model, batch, 1)) for batch in (SMALL, LARGE)
    )
    assert many <= MOST * few, f"{few} for {SMALL} samples, {many} for {LARGE}"


@every_form
def test_encoding(form):
    model = small_tokenizer(form).eval()

    def encode(batch):
        data = {"vae_latents": list(torch.randn(batch, 3, 8, 8).split(1))}
        return lambda: model.encode(dict(data))

    with torch.no_grad():
        few, many = (calls(encode(batch)) for batch in (SMALL, LARGE))
    assert many <= MOST * few, f"{few} for {SMALL} samples, {many} for {LARGE}"
