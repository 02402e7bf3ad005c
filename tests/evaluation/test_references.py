"""References are computed once per images, transform and network, and can be carried elsewhere."""

import json

import numpy as np
import pytest
import torch

from flextok.evaluation.features import as_extractor
from flextok.evaluation.images import ImageSetHash, first_images
from flextok.evaluation.references import Reference, cached_references, images_sum, imported_references
from tests.evaluation.networks import Pooled
from tests.evaluation.processes import in_processes
from tests.evaluation.stub import random_batches

CPU = torch.device("cpu")


def read(num_images=30, batch_size=4, **options):
    return first_images(random_batches(num_images, batch_size, **options), None)


def references(cache, *, gain=1.0, sample_size=20, **options):
    return cached_references(
        {"pooled": as_extractor(Pooled(gain), field="f")},
        lambda: read(**options),
        images_sha256=images_sum(read(**options)),
        sample_size=sample_size,
        cache=cache,
        device=CPU,
    )["pooled"]


def equal(a, b):
    return a.about == b.about and all(
        torch.equal(x, y) for x, y in ((a.mean, b.mean), (a.covariance, b.covariance), (a.sample, b.sample))
    )


def seen_by(work):
    before = Pooled.images_seen
    work()
    return Pooled.images_seen - before


# --- which images -----------------------------------------------------------------------------------------------------


def test_the_sum_of_images_knows_neither_batches_nor_order():
    order = torch.randperm(30).tolist()
    sums = {images_sum(read(batch_size=size)) for size in (1, 4, 30)} | {images_sum(read(order=order))}
    assert len(sums) == 1


@pytest.mark.parametrize("change", ["pixel", "key", "size", "fewer"])
def test_the_sum_of_images_knows_keys_and_pixels(change):
    images, names = torch.zeros(2, 3, 8, 8), ["a", "b"]
    original = images_sum([(images, names)])
    changed = images.clone()
    if change == "pixel":
        changed[1, 2, 7, 7] += 1 / 127.5
    elif change == "key":
        names = ["a", "c"]
    elif change == "size":
        changed = torch.zeros(2, 3, 4, 16)
    else:
        changed, names = changed[:1], names[:1]
    assert images_sum([(changed, names)]) != original


@pytest.mark.parametrize(("limit", "sizes"), [(None, [4, 4, 2]), (4, [4]), (5, [4, 1]), (100, [4, 4, 2])])
def test_first_images_takes_as_many_as_asked_for(limit, sizes):
    assert [len(keys) for _, keys in first_images(random_batches(10, 4), limit)] == sizes


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_second_evaluation_computes_nothing(tmp_path):
    first = references(tmp_path)
    assert seen_by(lambda: references(tmp_path, batch_size=7)) == 0
    assert equal(references(tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", [{"gain": 2.0}, {"num_images": 29}, {"size": 12}, {"sample_size": 19}])
def test_other_images_and_other_networks_are_computed(change, tmp_path):
    references(tmp_path)
    seen = seen_by(lambda: references(tmp_path, **change))
    assert seen == change.get("num_images", 30)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_reference_is_what_numpy_says(tmp_path):
    reference = references(tmp_path)
    module = Pooled().eval()
    features = torch.cat([module(images) for images, _ in read()]).double().numpy()
    np.testing.assert_allclose(reference.mean, features.mean(0), rtol=1e-9)
    np.testing.assert_allclose(reference.covariance, np.cov(features, rowvar=False), atol=1e-9)
    assert reference.about["num_images"] == 30
    assert reference.sample.shape == (20, 24)
    with np.load(next(tmp_path.iterdir())) as file:
        assert set(file) == {"mu", "sigma", "sample", "about"}
        assert json.loads(str(file["about"])) == reference.about


def test_a_damaged_file_is_named(tmp_path):
    references(tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{file.name} holds no reference statistics .* may be deleted"):
        references(tmp_path)


def test_a_file_under_the_name_of_another_is_refused(tmp_path):
    references(tmp_path / "a", gain=2.0)
    references(tmp_path / "b")
    ours, other = next((tmp_path / "b").iterdir()), next((tmp_path / "a").iterdir())
    ours.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="belongs to other images or another network; delete it"):
        references(tmp_path / "b")


def test_one_image_is_too_few(tmp_path):
    with pytest.raises(ValueError, match="at least two images"):
        references(tmp_path, num_images=1)


def of_my_share(rank, world_size, cache):
    mine = list(range(rank, 30, world_size))
    content = ImageSetHash()
    for images, keys in read(order=mine):
        content.add(images, keys)
    found = cached_references(
        {"pooled": as_extractor(Pooled(), field="f")},
        lambda: read(order=mine),
        images_sha256=content.of_all_processes(),
        sample_size=20,
        cache=cache,
        device=CPU,
    )
    return found["pooled"]


def test_two_processes_make_the_reference_of_one(tmp_path):
    alone = references(tmp_path / "one")
    for found in in_processes(of_my_share, tmp_path / "run", tmp_path / "two"):
        assert found.about == alone.about
        torch.testing.assert_close(found.mean, alone.mean, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.covariance, alone.covariance, rtol=0, atol=1e-9)
        # Other batches, and so other sums in float32.
        torch.testing.assert_close(found.sample, alone.sample)
    # One file, which one process alone finds again.
    assert [f.name for f in (tmp_path / "two").iterdir()] == [f.name for f in (tmp_path / "one").iterdir()]
    assert seen_by(lambda: references(tmp_path / "two")) == 0


# --- export and import ------------------------------------------------------------------------------------------------


def test_an_exported_reference_comes_back(tmp_path):
    reference = references(tmp_path / "cache")
    reference.save(tmp_path / "exported" / "pooled.npz")
    extractors = {"pooled": as_extractor(Pooled(), field="f")}
    assert equal(imported_references(extractors, tmp_path / "exported")["pooled"], reference)


def test_an_imported_reference_must_be_of_the_same_network(tmp_path):
    references(tmp_path / "cache").save(tmp_path / "pooled.npz")
    with pytest.raises(ValueError, match=r"pooled\.npz: extractor_sha256 is .*evaluation\.features\.pooled has"):
        imported_references({"pooled": as_extractor(Pooled(gain=2.0), field="f")}, tmp_path)


def test_a_reference_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pooled\.npz holds no reference statistics"):
        imported_references({"pooled": as_extractor(Pooled(), field="f")}, tmp_path)


@pytest.mark.parametrize("missing", ["mu", "about"])
def test_files_of_others_without_what_we_need_are_refused(missing, tmp_path):
    arrays = {"mu": np.zeros(3), "sigma": np.zeros((3, 3)), "sample": np.zeros((2, 3)), "about": np.array("{}")}
    del arrays[missing]
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=r"other\.npz holds no reference statistics"):
        Reference.load(tmp_path / "other.npz")
