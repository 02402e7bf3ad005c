import pytest
import torch

from flextok.model.keep_k import default_keep_ks
from flextok.training.validation import encode_batch, flow_losses

OPTIONS = {"keep_ks": [1, 4], "num_sigmas": 2, "seed": 0}


def losses_of(model, images, keys, *, seed, **options):
    encoded = encode_batch(model, {"image": images, "key": keys}, seed=seed)
    return flow_losses(model, encoded, seed=seed, **options)


@pytest.mark.parametrize(("num_registers", "keep_ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_default_keep_ks_end_at_all_registers(num_registers, keep_ks):
    assert default_keep_ks(num_registers) == keep_ks


@torch.no_grad()
def test_the_loss_of_an_image_does_not_depend_on_its_batch(small_model):
    small_model.eval()
    images, keys = torch.randn(3, 3, 8, 8), ["a", "b", "c"]
    together = losses_of(small_model, images, keys, **OPTIONS)
    assert together.shape == (2, 3)
    for i, key in enumerate(keys):
        alone = losses_of(small_model, images[i : i + 1], [key], **OPTIONS)
        torch.testing.assert_close(alone[:, 0], together[:, i])


@torch.no_grad()
def test_the_loss_is_fixed_by_the_seed_alone(small_model):
    small_model.eval()
    images, keys = torch.randn(2, 3, 8, 8), ["a", "b"]
    first = losses_of(small_model, images, keys, **OPTIONS)
    torch.manual_seed(123)
    assert torch.equal(losses_of(small_model, images, keys, **OPTIONS), first)
    assert not torch.equal(losses_of(small_model, images, keys, **{**OPTIONS, "seed": 1}), first)
    assert not torch.equal(first[0], first[1])  # keep_k matters
