"""Token statistics of ids whose statistics are known."""

import math

import pytest
import torch

from flextok.evaluation.tokens import entropy_bits, token_statistics


def test_constant_tokens_use_one_code_and_carry_no_bits():
    statistics = token_statistics(torch.full((5, 3), 7), 16)
    assert statistics["codes_used"] == 1
    assert statistics["codebook_usage"] == 1 / 16
    assert statistics["perplexity"] == 1.0
    assert statistics["entropy_bits_per_position"] == [0.0] * 3


def test_uniform_tokens_use_everything():
    tokens = torch.stack([torch.arange(8), torch.arange(8).roll(3)], dim=1)
    statistics = token_statistics(tokens, 8)
    assert statistics["codebook_usage"] == 1.0
    assert statistics["perplexity"] == pytest.approx(8)
    assert statistics["entropy_bits_per_position"] == pytest.approx([3.0, 3.0])
    assert statistics["bits_per_token"] == 3.0
    assert statistics["bits_per_image"] == 6.0


def test_entropy_is_told_apart_by_position():
    tokens = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 1]])
    statistics = token_statistics(tokens, 4)
    assert statistics["entropy_bits_per_position"] == pytest.approx([0.0, 1.0])
    assert statistics["entropy_bits_mean"] == pytest.approx(0.5)
    # Six zeros and two ones.
    assert math.log2(statistics["perplexity"]) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


@pytest.mark.parametrize(("num_images", "ceiling"), [(1, 0.0), (4, 2.0), (1000, 6.0)])
def test_the_bias_of_few_images_is_told(num_images, ceiling):
    statistics = token_statistics(torch.zeros(num_images, 2, dtype=torch.int64), 64)
    assert statistics["entropy_ceiling_bits"] == ceiling
    assert statistics["codebook_usage_ceiling"] == min(1.0, 2 * num_images / 64)


def test_entropy_of_skewed_ids():
    assert entropy_bits(torch.tensor([0, 0, 1, 2])) == pytest.approx(1.5)


@pytest.mark.parametrize("bad", [-1, 8])
def test_ids_outside_the_codebook_are_refused(bad):
    with pytest.raises(ValueError, match="valid are 0 to 7"):
        token_statistics(torch.tensor([[0, bad]]), 8)
