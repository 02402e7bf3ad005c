import pytest
import torch

from flextok.training.pictures import reconstructions, tile


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (63, 2), (64, 1), (100, 1)])
def test_small_images_are_enlarged_by_whole_factors(size, factor):
    picture = tile([torch.zeros(2, 3, size, size), torch.zeros(2, 3, size, size)])
    assert picture.shape == (2 * size * factor, 2 * size * factor, 3)


def test_rows_go_down_and_images_to_the_right():
    first, second = torch.full((2, 3, 64, 64), -1.0), torch.full((2, 3, 64, 64), 1.0)
    second[1] = 5.0  # beyond white
    picture = tile([first, second])
    assert (picture[:64] == 0).all()
    assert (picture[64:] == 255).all()


def test_reconstructions_depend_on_seed_and_key_only(small_model):
    small_model.eval()
    images = torch.randn(2, 3, 8, 8)
    options = {"keep_ks": [1, 4], "seed": 0, "timesteps": 2}
    both = reconstructions(small_model, images, ["a", "b"], **options)
    assert [row.shape for row in both] == [(2, 3, 8, 8)] * 2
    torch.manual_seed(9)
    alone = reconstructions(small_model, images[1:], ["b"], **options)
    torch.testing.assert_close(alone[0][0], both[0][1])
    assert not torch.equal(both[0], both[1])
