"""Networks in an evaluation: the same numbers however it is batched, and what is missing is said."""

import json

import pytest
import torch

from flextok.evaluation.judges import build_judges
from flextok.evaluation.point_metrics import PointMetrics
from flextok.evaluation.settings import EvaluationSettings
from tests.evaluation.networks import Pooled
from tests.evaluation.processes import in_processes
from tests.evaluation.stub import SETTINGS, StubTokenizer, random_batches, run_sweep

CPU = torch.device("cpu")
NETWORKS = "tests.evaluation.networks"
POOLED = {"_target_": f"{NETWORKS}.Pooled"}
DIFFERENCE = {"_target_": f"{NETWORKS}.LargestDifference"}


def settings_for(tmp_path, **options):
    features, distances = {"pooled": POOLED}, {"largest": DIFFERENCE}
    given = {"features": features, "distances": distances, "reference_cache": str(tmp_path / "cache"), **options}
    return EvaluationSettings.from_mapping({**SETTINGS, **given})


def evaluate(tmp_path, num_images=40, batch_size=8, order=None, **options):
    settings = settings_for(tmp_path, **options)
    batches = random_batches(num_images, batch_size, order=order)
    judges = build_judges(settings, lambda: batches, CPU)
    return run_sweep(StubTokenizer(), batches, settings, judges)


def rows(result):
    timeless = [{name: value for name, value in row.items() if name != "seconds_per_image"} for row in result.results]
    return [*timeless, {"keep_k": 0, "bits_per_image": 0.0, **result.encoded.vae}]


def test_rows_hold_distances_of_pairs_and_of_sets(tmp_path):
    result = evaluate(tmp_path)
    for row in rows(result):
        assert {"largest", "largest_se", "fid_pooled", "kid_pooled", "kid_pooled_se"} <= row.keys()
        assert row["kid_pooled_se"] is None  # one subset of 40 images
        assert "missing" not in row
        json.dumps(row, allow_nan=False)
    fids = [row["fid_pooled"] for row in result.results]
    assert fids == sorted(fids, reverse=True)
    assert result.encoded.vae["fid_pooled"] == pytest.approx(0, abs=1e-9)
    assert result.encoded.vae["largest"] == 0.0


def test_several_subsets_give_kid_a_standard_error(tmp_path):
    row = evaluate(tmp_path, kid_subset_size=10).results[0]
    assert row["kid_pooled_se"] > 0
    assert row["kid_pooled"] != evaluate(tmp_path, kid_subset_size=10, seed=1).results[0]["kid_pooled"]


@pytest.mark.parametrize("kid_subset_size", [10, 1000])
def test_neither_batch_size_nor_order_changes_the_numbers(kid_subset_size, tmp_path):
    """Nor does the cache, which the first of these evaluations fills."""
    expected = rows(evaluate(tmp_path, kid_subset_size=kid_subset_size))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    fresh = tmp_path / "fresh"
    for folder, batch_size, given in ((tmp_path, 1, None), (fresh, 7, None), (tmp_path, 40, None), (fresh, 3, order)):
        found = rows(evaluate(folder, batch_size=batch_size, order=given, kid_subset_size=kid_subset_size))
        for row, other in zip(found, expected, strict=True):
            assert row == {name: pytest.approx(value, abs=1e-5) for name, value in other.items()}


def test_the_images_are_only_looked_at_again_where_a_reference_is_missing(tmp_path):
    def seen_by_building(**options):
        before = Pooled.images_seen
        build_judges(settings_for(tmp_path, **options), lambda: random_batches(40, 8), CPU)
        return Pooled.images_seen - before

    assert [seen_by_building() for _ in range(3)] == [40, 0, 0]
    assert seen_by_building(num_images=10) == 10
    assert seen_by_building(features={"again": POOLED, "other": {**POOLED, "gain": 2.0}}) == 40
    assert seen_by_building(features={"pooled": POOLED, "other": {**POOLED, "gain": 2.0}}) == 0


def test_references_can_be_exported_and_imported(tmp_path):
    exported = rows(evaluate(tmp_path, export_references=str(tmp_path / "exported")))
    before = Pooled.images_seen
    settings = settings_for(
        tmp_path, import_references=str(tmp_path / "exported"), reference_cache=str(tmp_path / "none")
    )
    judges = build_judges(settings, lambda: random_batches(40, 8), CPU)
    assert Pooled.images_seen == before
    result = run_sweep(StubTokenizer(), random_batches(40, 8), settings, judges)
    assert rows(result) == exported
    assert not (tmp_path / "none").exists()


def test_imported_references_of_other_images_are_reported(tmp_path, caplog):
    evaluate(tmp_path, export_references=str(tmp_path / "exported"))
    settings = settings_for(tmp_path, import_references=str(tmp_path / "exported"))
    judges = build_judges(settings, lambda: random_batches(30, 8), CPU)
    assert "features.pooled: the imported references are of other images" in caplog.text
    known = judges.protocol()["features.pooled"]["references"]
    assert known["num_images"] == 40
    assert known["images_sha256"] != judges.images_sha256


def test_images_that_change_under_way_are_an_error(tmp_path):
    settings = settings_for(tmp_path)
    judges = build_judges(settings, lambda: random_batches(8, 8), CPU)
    with pytest.raises(ValueError, match="images changed while they were evaluated"):
        run_sweep(StubTokenizer(), random_batches(9, 8), settings, judges)


def test_too_few_images_for_the_covariance_are_a_warning_and_in_the_protocol(tmp_path, caplog):
    settings = settings_for(tmp_path)
    few = build_judges(settings, lambda: random_batches(24, 8), CPU)
    assert "features.pooled: 24 images are too few for a covariance of 24 features" in caplog.text
    caplog.clear()
    enough = build_judges(settings, lambda: random_batches(25, 8), CPU)
    assert caplog.text == ""
    assert [j.protocol()["features.pooled"]["covariance_is_singular"] for j in (few, enough)] == [True, False]


def test_missing_weights_leave_their_metrics_out_and_say_why(tmp_path, caplog):
    inception = {"_target_": "flextok.evaluation.features.InceptionFeatures", "path": str(tmp_path / "none.pt")}
    lpips = {
        "_target_": "flextok.evaluation.lpips.LPIPS",
        "network": "alex",
        "path": str(tmp_path / "no.pth"),
        "heads": None,
    }
    result = evaluate(tmp_path, features={"inception": inception, "pooled": POOLED}, distances={"lpips": lpips})
    for row in rows(result):
        names = ("fid_inception", "kid_inception", "kid_inception_se", "lpips", "lpips_se")
        assert [row[name] for name in names] == [None] * 5
        assert f"fid_inception, kid_inception, kid_inception_se: {tmp_path}/none.pt does not exist" in row["missing"]
        assert f"lpips, lpips_se: {tmp_path}/no.pth does not exist" in row["missing"]
        assert row["fid_pooled"] is not None
        assert row["psnr"] is not None
    assert "evaluation.features.inception is left out" in caplog.text
    only_missing = evaluate(tmp_path, features={"inception": inception}, distances={})
    assert only_missing.results[0]["fid_inception"] is None


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"_target_": "tests.evaluation.networks.Nothing"}, r"evaluation\.features\.mine: .*Nothing"),
        ({"_target_": "collections.OrderedDict"}, r"evaluation\.features\.mine builds a OrderedDict; valid: a torch"),
        ({**POOLED, "colour": 3}, r"evaluation\.features\.mine: .*colour"),
    ],
)
def test_a_network_that_cannot_be_built_is_an_error(network, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, features={"mine": network})


def test_a_distance_without_a_number_for_each_image_is_an_error(tmp_path):
    settings = settings_for(tmp_path, features={}, distances={"mine": {"_target_": "torch.nn.PairwiseDistance"}})
    metrics = PointMetrics(build_judges(settings, lambda: [], CPU), settings)
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"evaluation\.distances\.mine must give one number for each of 2 images"):
        metrics.add(images, images, ["a", "b"])


def test_a_distance_must_be_a_module(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.distances\.mine builds a OrderedDict; valid: a torch module"):
        build_judges(settings_for(tmp_path, distances={"mine": {"_target_": "collections.OrderedDict"}}), list, CPU)


def share_of_a_sweep(rank, world_size, folder):
    settings = settings_for(folder, kid_subset_size=10)
    batches = [b for b in random_batches(40, 3, order=list(range(rank, 40, world_size))) if b["key"]]
    judges = build_judges(settings, lambda: batches, CPU)
    result = run_sweep(StubTokenizer(), batches, settings, judges)
    return result.encoded.images_sha256, rows(result)


def test_two_processes_measure_the_sets_that_one_measures(tmp_path):
    expected_sum, expected = share_of_a_sweep(0, 1, tmp_path / "one")
    for images_sha256, found in in_processes(share_of_a_sweep, tmp_path / "run", tmp_path / "two"):
        assert images_sha256 == expected_sum
        for row, other in zip(found, expected, strict=True):
            assert row == {name: pytest.approx(value, abs=1e-6) for name, value in other.items()}
