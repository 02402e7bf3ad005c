"""What an image becomes depends on the model, the seed and its key; not on its batch, nor on who asks."""

import pytest
import torch

from flextok.data.transforms import to_uint8
from flextok.model.data_dict import RNG_KEY
from flextok.reconstruct import decode_latents, decode_tokens, encode_images
from flextok.training.pictures import reconstructions
from tests.evaluation.stub import StubTokenizer, random_batches, run_sweep


@pytest.fixture
def batch():
    return random_batches(3, 3)[0]


def test_an_image_alone_is_the_image_in_its_batch(batch):
    images, keys = batch["image"], batch["key"]
    together = encode_images(StubTokenizer(), images, keys, seed=0)
    alone = encode_images(StubTokenizer(), images[1:2], keys[1:2], seed=0)
    assert torch.equal(alone.tokens[0], together.tokens[1])
    decoded = [decode_tokens(StubTokenizer(), encoded, keep_k=1, seed=0) for encoded in (together, alone)]
    assert torch.equal(decoded[0][1:2], decoded[1])
    assert torch.equal(decode_latents(StubTokenizer(), alone), images[1:2])


def test_the_start_noise_is_one_for_every_keep_k_and_another_for_every_seed(batch):
    model = StubTokenizer()
    encoded = encode_images(model, batch["image"], batch["key"], seed=0)
    first, again, other = (decode_tokens(model, encoded, keep_k=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_encoding_and_decoding_draw_different_numbers(batch):
    seen = []

    class Watched(StubTokenizer):
        def encode(self, data):
            seen.append([torch.rand(1, generator=generator) for generator in data[RNG_KEY]])
            return super().encode(data)

        def decode(self, data, **options):
            seen.append([torch.rand(1, generator=generator) for generator in data[RNG_KEY]])
            return super().decode(data, **options)

    decode_tokens(Watched(), encode_images(Watched(), batch["image"], batch["key"], seed=0), keep_k=1, seed=0)
    assert all(a != b for a, b in zip(*seen, strict=True))


def test_training_shows_the_reconstructions_that_evaluation_measures(batch):
    images, keys = batch["image"], batch["key"]
    sweep = run_sweep(
        StubTokenizer(),
        [batch],
        {"seed": 3, "keep_ks": [2], "grid_images": len(keys)},
    )
    encoded = encode_images(StubTokenizer(), images, keys, seed=3)
    (shown,) = reconstructions(StubTokenizer(), encoded, keep_ks=[2], seed=3)
    assert torch.equal(to_uint8(shown), sweep.pictures[0].first)
