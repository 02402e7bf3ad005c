"""A target is met as the metrics of an evaluation say; distances of networks are to be small."""

import pytest
import torch

from flextok.evaluation.judges import NO_JUDGES
from flextok.evaluation.networks import Networks, build_networks
from flextok.evaluation.reconstruction import image_metrics
from flextok.evaluation.shortest import num_rounds, shortest_prefixes, tokens_needed
from flextok.evaluation.targets import Target, cosine_distances
from flextok.reconstruct import decode_tokens, encode_images
from tests.evaluation.networks import Pooled
from tests.evaluation.stub import StubTokenizer, random_batches

CPU = torch.device("cpu")
NETWORKS = build_networks(
    {"pooled": {"_target_": "tests.evaluation.networks.Pooled"}},
    {"largest": {"_target_": "tests.evaluation.networks.LargestDifference"}},
    CPU,
)


def pairs():
    (batch,) = random_batches(6, 6)
    noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(1))
    strength = torch.linspace(0.05, 1.5, 6)[:, None, None, None]
    return batch["image"], batch["image"] + strength * noise


def test_a_target_is_text_and_back():
    for text in ("psnr=24", "ssim=0.9", "psnr=-1", "lpips=0.2", "lpips=1e-07", "psnr=24.000000000000004"):
        target = Target.parse(text, networks=["lpips"])
        assert str(target) == text
        assert Target.parse(str(target), networks=["lpips"]) == target
    assert str(Target.parse("psnr=24.0")) == "psnr=24"


def test_only_networks_that_are_there_are_targets():
    with pytest.raises(ValueError, match=r"'lpips=0\.2': valid are psnr=NUMBER, ssim=NUMBER$"):
        Target.parse("lpips=0.2")
    with pytest.raises(ValueError, match="valid are psnr=NUMBER, ssim=NUMBER, lpips=NUMBER, inception=NUMBER"):
        Target.parse("blur=3", networks=["lpips", "inception"])


@pytest.mark.parametrize("metric", ["psnr", "ssim"])
def test_quality_is_at_least_the_target(metric):
    images, ours = pairs()
    quality = image_metrics(ours, images)[metric]
    assert len(set(quality)) == 6
    for value in quality:
        assert Target(metric, value).judge(images)(ours) == [found >= value for found in quality]


def test_a_distance_is_at_most_the_target():
    images, ours = pairs()
    distances = (ours.clamp(-1, 1) - images).abs().amax(dim=(1, 2, 3)).tolist()
    for value in distances:
        assert Target("largest", value).judge(images, NETWORKS)(ours) == [found <= value for found in distances]


def test_the_distance_of_features_is_one_minus_the_cosine():
    images, ours = pairs()
    f, g = (Pooled().eval()(batch.clamp(-1, 1)).double() for batch in (images, ours))
    distances = (1 - (f * g).sum(1) / (f.norm(dim=1) * g.norm(dim=1))).tolist()
    assert cosine_distances(f, g) == pytest.approx(distances, abs=1e-12)
    assert min(distances) > 1e-4
    for value in distances:
        for near in (value - 1e-6, value + 1e-6):
            expected = [found <= near for found in distances]
            assert Target("pooled", near).judge(images, NETWORKS)(ours) == expected
    # The features of the images are asked for once, however often there is a question.
    before = Pooled.images_seen
    judge = Target("pooled", 0.1).judge(images, NETWORKS)
    for _ in range(3):
        judge(ours)
    assert Pooled.images_seen - before == 4 * len(images)


def test_the_angle_decides_and_not_the_length():
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    others = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert cosine_distances(rows, others) == pytest.approx([0, 1, 2, 1 - 0.5**0.5, 1])


@pytest.mark.parametrize("target", [Target("largest", 0.7), Target("pooled", 0.05)])
def test_needed_tokens_meet_a_distance_and_one_less_does_not(target):
    (batch,) = random_batches(12, 12, size=2)
    images = torch.nn.functional.interpolate(batch["image"], size=8)  # four areas of one colour each
    model = StubTokenizer()
    encoded = encode_images(model, images, batch["key"], seed=0)
    found = tokens_needed(model, images, encoded, target, longest=4, seed=0, networks=NETWORKS)
    judge = target.judge(images, NETWORKS)
    met = {keep_k: judge(decode_tokens(model, encoded, keep_k=keep_k, seed=0)) for keep_k in range(1, 5)}
    assert len(set(found)) > 1
    for image, number in enumerate(found):
        if number is None:
            assert not met[4][image]
        else:
            assert met[number][image]
            assert number == 1 or not met[number - 1][image]


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 7, 8, 255, 256])
def test_the_number_of_rounds_is_known(longest):
    rounds = []
    for needed in range(1, longest + 2):
        asked = []
        shortest_prefixes(lambda k, n=needed, a=asked: [a.append(k) is None and k[0] >= n], 1, longest=longest)
        rounds.append(len(asked))
    assert max(rounds) == num_rounds(longest)


def test_networks_may_be_none():
    assert Networks() == Networks(extractors={}, distances={}, missing={})
    assert Target("psnr", 5.0).judge(torch.zeros(1, 3, 4, 4), NO_JUDGES)(torch.zeros(1, 3, 4, 4)) == [True]
