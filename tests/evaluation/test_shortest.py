"""The smallest number of tokens that meets a target is what trying all numbers finds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.evaluation.reconstruction import image_metrics
from flextok.evaluation.shortest import shortest_prefixes, tokens_needed
from flextok.evaluation.targets import Target
from flextok.reconstruct import decode_tokens, encode_images
from tests.evaluation.stub import StubTokenizer, random_batches


@given(longest=st.integers(1, 40), needed=st.lists(st.integers(1, 41), max_size=6))
def test_bisection_finds_the_number_in_few_questions(longest, needed):
    needed = [min(number, longest + 1) for number in needed]
    questions = []

    def is_met(asked):
        questions.append(asked)
        assert all(1 <= number <= longest for number in asked)
        return [number >= enough for number, enough in zip(asked, needed, strict=True)]

    found = shortest_prefixes(is_met, len(needed), longest=longest)
    assert found == [None if number > longest else number for number in needed]
    assert len(questions) <= math.ceil(math.log2(longest + 1))


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_where_quality_is_not_monotonous_one_less_is_too_few(answers):
    (found,) = shortest_prefixes(lambda asked: [answers[asked[0] - 1]], 1, longest=len(answers))
    if found is None:
        assert not answers[-1]
    else:
        assert answers[found - 1]
        assert found == 1 or not answers[found - 2]


@pytest.mark.parametrize("target", [Target("psnr", 12.0), Target("psnr", 16.5), Target("ssim", 0.8)])
def test_needed_tokens_meet_the_target_and_one_less_does_not(target):
    (batch,) = random_batches(12, 12, size=2)
    batch["image"] = torch.nn.functional.interpolate(batch["image"], size=8)  # four areas of one colour each
    model = StubTokenizer()
    encoded = encode_images(model, batch["image"], batch["key"], seed=0)
    found = tokens_needed(model, batch["image"], encoded, target, longest=4, seed=0)
    quality = {
        keep_k: image_metrics(decode_tokens(model, encoded, keep_k=keep_k, seed=0), batch["image"])[target.metric]
        for keep_k in range(1, 5)
    }
    assert len(set(found)) > 1
    for image, number in enumerate(found):
        if number is None:
            assert quality[4][image] < target.value
        else:
            assert quality[number][image] >= target.value
            assert number == 1 or quality[number - 1][image] < target.value


def test_every_image_may_have_its_own_number():
    (batch,) = random_batches(3, 3)
    model = StubTokenizer()
    encoded = encode_images(model, batch["image"], batch["key"], seed=0)
    together = decode_tokens(model, encoded, keep_k=[1, 4, 2], seed=0)
    for image, keep_k in enumerate([1, 4, 2]):
        assert torch.equal(together[image], decode_tokens(model, encoded, keep_k=keep_k, seed=0)[image])


def test_targets_are_read_from_text():
    assert Target.parse("psnr=24") == Target("psnr", 24.0)
    assert Target.parse("ssim=0.9") == Target("ssim", 0.9)
    for text in ("psnr", "psnr=", "psnr=high", "psnr=nan", "psnr=inf", "blur=3", "=3", ""):
        with pytest.raises(ValueError, match="valid are psnr=NUMBER, ssim=NUMBER"):
            Target.parse(text)
