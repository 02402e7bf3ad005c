"""The numbers of a sweep depend on the images and the seed; not on how they were batched or ordered."""

import math

import pytest
import torch

from flextok.data.transforms import to_uint8
from tests.evaluation.stub import StubTokenizer, random_batches, run_sweep


def sweep(batches, **options):
    return run_sweep(StubTokenizer(), batches, options)


def numbers(result):
    timeless = [{name: value for name, value in row.items() if name != "seconds_per_image"} for row in result.results]
    return {"results": timeless, "vae": result.encoded.vae, "tokens": result.encoded.tokens}


def test_more_tokens_are_closer_and_cost_more_bits():
    result = sweep(random_batches(16, 4))
    assert [row["keep_k"] for row in result.results] == [1, 2, 4]
    psnrs = [row["psnr"] for row in result.results]
    assert psnrs == sorted(psnrs)
    assert result.encoded.vae["psnr"] == 100.0
    assert [row["bits_per_image"] for row in result.results] == [pytest.approx(k * math.log2(125)) for k in (1, 2, 4)]
    assert all(row["seconds_per_image"] > 0 for row in result.results)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 15, 16])
def test_the_batch_size_changes_nothing(batch_size):
    assert numbers(sweep(random_batches(16, batch_size))) == numbers(sweep(random_batches(16, 16)))


def test_the_order_changes_nothing():
    shuffled = random_batches(16, 3, order=torch.randperm(16).tolist())
    assert numbers(sweep(shuffled)) == numbers(sweep(random_batches(16, 4)))


def test_the_seed_changes_only_what_is_drawn():
    a, b = sweep(random_batches(8, 4), seed=0), sweep(random_batches(8, 4), seed=1)
    assert a.results[0]["psnr"] != b.results[0]["psnr"]
    assert a.results[-1]["psnr"] == b.results[-1]["psnr"]


@pytest.mark.parametrize("num_images", [1, 3, 4, 5, 8])
def test_num_images_takes_the_first_ones(num_images):
    result = sweep(random_batches(8, 4), num_images=num_images)
    assert len(result.encoded.keys) == num_images
    assert result.results == [
        {**row, "seconds_per_image": pytest.approx(row["seconds_per_image"], rel=1e9)}
        for row in sweep(random_batches(8, 8)[0:1], num_images=num_images).results
    ]


def test_one_image_has_no_standard_error():
    row = sweep(random_batches(1, 1)).results[0]
    assert row["psnr_se"] is None
    assert row["ssim_se"] is None


def test_a_shorter_split_is_used_whole_with_a_warning(caplog):
    assert len(sweep(random_batches(3, 2), num_images=5).encoded.keys) == 3
    assert "asked for 5 images" in caplog.text


def test_an_empty_split_is_an_error():
    with pytest.raises(ValueError, match="holds no images"):
        sweep([])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pictures_are_of_the_first_images(batch_size):
    batches = random_batches(5, batch_size)
    result = sweep(batches, grid_images=3)
    assert torch.equal(result.encoded.originals, to_uint8(torch.cat([batch["image"] for batch in batches])[:3]))
    assert [point.keep_k for point in result.points] == [1, 2, 4]
    assert all(pictures.first.shape == (3, 3, 8, 8) for pictures in result.pictures)


def test_pictures_of_another_size_are_left_out():
    result = sweep([*random_batches(1, 1), *random_batches(1, 1, size=12)])
    assert len(result.encoded.originals) == 1
    assert result.encoded.image_sizes == [[8, 8], [12, 12]]


def test_the_model_decodes_with_the_options_of_the_settings(monkeypatch):
    seen, decode = [], StubTokenizer.decode

    def watched(model, data, **options):
        seen.append({name: value for name, value in options.items() if name not in ("vae_image_sizes", "verbose")})
        return decode(model, data, **options)

    monkeypatch.setattr(StubTokenizer, "decode", watched)
    options = {"sampler": "heun", "timestep_shift": 3.0, "guidance_every": 2, "guidance_scale": 2.0}
    sweep(random_batches(1, 1), keep_ks=[1, 2], guidance_interval=[0.2, 0.8], **options)
    expected = {"timesteps": 2, "perform_norm_guidance": False, "guidance_interval": (0.2, 0.8), **options}
    assert seen == [expected] * 2
