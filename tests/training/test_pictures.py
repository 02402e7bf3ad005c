import torch

from flextok.reconstruct import encode_images
from flextok.training.pictures import reconstructions


def test_reconstructions_depend_on_seed_and_key_only(small_model):
    small_model.eval()
    images = torch.randn(2, 3, 8, 8)
    options = {"keep_ks": [1, 4], "seed": 0, "timesteps": 2}
    both = reconstructions(small_model, encode_images(small_model, images, ["a", "b"], seed=0), **options)
    assert [row.shape for row in both] == [(2, 3, 8, 8)] * 2
    torch.manual_seed(9)
    alone = reconstructions(small_model, encode_images(small_model, images[1:], ["b"], seed=0), **options)
    torch.testing.assert_close(alone[0][0], both[0][1])
    assert not torch.equal(both[0], both[1])
