"""Points of a sweep, what they do to a model, and how its images and its time are divided."""

import logging

import pytest

from flextok.config import compose
from flextok.evaluation.grid import Curve, Point, check_forms, make_grid, prepare
from flextok.evaluation.images import first_images
from flextok.evaluation.progress import Progress, duration
from tests.evaluation.processes import in_processes
from tests.evaluation.stub import StubTokenizer, random_batches, run_sweep, settings_with
from tests.support import small_tokenizer

# --- points -----------------------------------------------------------------------------------------------------------


def test_the_grid_is_every_combination_curve_after_curve():
    settings = settings_with(steps=[5, 2], guidance_scale=[1, 3], forms=["packed", "attention_mask"], backends="sdpa")
    grid = make_grid(settings, [1, 4])
    assert len(grid) == len(set(grid)) == len({point.name for point in grid}) == 16
    assert [point.keep_k for point in grid] == [1, 4] * 8
    assert grid[0] == Point(1, Curve(2, 1.0, "packed", "sdpa"))
    assert grid[3] == Point(4, Curve(2, 3.0, "packed", "sdpa"))
    assert [point.columns for point in make_grid(settings_with(), [4])] == [
        {"keep_k": 4, "steps": 2, "guidance_scale": 1.0}
    ]


@pytest.mark.parametrize(
    ("curve", "label"),
    [
        (Curve(25, 1.0), "25 steps"),
        (Curve(1, 7.5), "1 step, guidance 7.5"),
        (Curve(4, 0.0, "packed", "flex"), "4 steps, guidance 0, packed, flex"),
    ],
)
def test_labels_say_what_a_curve_is(curve, label):
    assert curve.label == label


@pytest.mark.parametrize(
    ("sampler", "curve", "passes"),
    [("euler", Curve(5, 1.0), 5), ("euler", Curve(5, 3.0), 10), ("heun", Curve(5, 1.0), 9), ("heun", Curve(1, 2.0), 2)],
)
def test_passes_through_the_decoder(sampler, curve, passes):
    assert Point(1, curve).passes(sampler) == passes


def test_rows_say_their_point():
    result = run_sweep(StubTokenizer(), random_batches(4, 4), {"keep_ks": [1, 4], "steps": [1, 2], "guidance_scale": 3})
    rows = [[row[name] for name in ("keep_k", "steps", "guidance_scale")] for row in result.results]
    assert rows == [[1, 1, 3.0], [4, 1, 3.0], [1, 2, 3.0], [4, 2, 3.0]]
    assert all("form" not in row and "backend" not in row for row in result.results)


# --- forms and backends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", ["attention_mask", "packed"])
def test_both_forms_and_all_backends_give_the_same_numbers(dropout):
    model = small_tokenizer(dropout)
    options = {"keep_ks": [1, 6, 16], "forms": ["attention_mask", "packed"], "backends": ["sdpa", "reference"]}
    result = run_sweep(model.eval(), random_batches(4, 4), options)
    rows = {(row["form"], row["backend"], row["keep_k"]): row["psnr"] for row in result.results}
    assert len(rows) == 12
    assert len({rows["packed", "sdpa", keep_k] for keep_k in (1, 6, 16)}) == 3
    for (_, _, keep_k), psnr in rows.items():
        assert psnr == pytest.approx(rows["packed", "sdpa", keep_k], abs=1e-4)
    used = {
        point.curve.backend: numbers.attention_backends
        for point, numbers in zip(result.points, result.numbers, strict=True)
    }
    assert used == {"sdpa": ["sdpa"], "reference": ["reference"]}


def test_forms_leave_tokens_out_or_hide_them():
    from flextok.model.preprocessors.nested_dropout_seq_packer import NestedDropoutSequencePacker

    model = small_tokenizer("attention_mask").eval()
    (packer,) = (module for module in model.modules() if isinstance(module, NestedDropoutSequencePacker))
    for form, drops in (("packed", True), ("attention_mask", False)):
        prepare(model, Curve(1, 1.0, form), None)
        assert packer._drops is drops


def test_models_with_mask_tokens_have_one_form():
    with pytest.raises(ValueError, match=r"evaluation\.forms=\['packed'\]: .*valid: null"):
        check_forms(small_tokenizer("mask_token"), settings_with(forms="packed"))
    check_forms(small_tokenizer("mask_token"), settings_with())


# --- division of the images -------------------------------------------------------------------------------------------


def keys_read(rank, world_size, unreadable, limit):
    batches = [None if number in unreadable else batch for number, batch in enumerate(random_batches(22, 3))]
    return [list(keys) for _, keys in first_images(batches[rank::world_size], limit)]


@pytest.mark.parametrize("limit", [None, 1, 9, 10, 100])
@pytest.mark.parametrize("unreadable", [(), (0, 3)])
def test_processes_read_what_one_reads(unreadable, limit, tmp_path):
    expected = keys_read(0, 1, unreadable, limit)
    for world_size in (2, 3):
        of_ranks = in_processes(keys_read, tmp_path / str(world_size), unreadable, limit, world_size=world_size)
        assert sorted(keys for of_rank in of_ranks for keys in of_rank) == sorted(expected)
        assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 2


def test_whole_batches_are_the_same_however_they_are_divided(monkeypatch):
    from hydra.utils import instantiate

    from flextok.data import datamodule

    def batches(rank, world_size):
        monkeypatch.setattr(datamodule, "rank_and_world_size", lambda: (rank, world_size))
        data = instantiate(compose(["data=digits", "data.eval_batch_size=100"]).data)
        data.setup("test")
        return [batch["key"] for batch in data.whole_batches("test")]

    alone, shares = batches(0, 1), [batches(rank, 3) for rank in range(3)]
    assert len(alone[0]) == 100
    assert [shares[number % 3][number // 3] for number in range(len(alone))] == alone
    assert sum(map(len, shares)) == len(alone)


# --- progress ---------------------------------------------------------------------------------------------------------


def test_the_estimate_weighs_what_is_left_by_passes(caplog):
    caplog.set_level(logging.INFO)
    now = 0.0
    progress = Progress([5, 5, 20], 10, num_processes=2, clock=lambda: now)
    assert progress.seconds_left() is None
    now = 4.0
    progress.add(5)  # 25 of 300 passes
    assert progress.seconds_left() == pytest.approx(44.0)
    assert caplog.messages == []
    now = 11.0
    progress.add(5)
    assert caplog.messages == ["measuring point 1 of 3, 100 %, 1.82 images/s, 55 s left"]
    progress.end_point("1 token")
    progress.add(10)
    progress.end_point("2 tokens")
    assert progress.seconds_left() == pytest.approx(22.0)
    now = 33.0
    progress.add(10)
    progress.end_point("4 tokens")
    assert progress.seconds_left() == 0.0
    assert caplog.messages[-1] == "measured 4 tokens: point 3 of 3, 100 %, 0.909 images/s, 0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200.0, "3 min 20 s"), (7500.0, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_nothing_of_the_images_is_read_for_points_that_are_there(tmp_path):
    batches = random_batches(4, 4)
    run_sweep(StubTokenizer(), batches, {}, folder=tmp_path)

    class ReadOnce(list):
        times = 0

        def __iter__(self):
            assert self.times == 0
            self.times += 1
            return super().__iter__()

    assert len(run_sweep(StubTokenizer(), ReadOnce(batches), {}, folder=tmp_path).results) == 3


def test_other_images_than_those_that_were_encoded_are_an_error():
    class Changing(list):
        shorter = False

        def __iter__(self):
            found, self.shorter = list(super().__iter__()), not self.shorter
            return iter(found if self.shorter else found[:-1])

    with pytest.raises(ValueError, match="there were more of them before"):
        run_sweep(StubTokenizer(), Changing(random_batches(8, 4)), {})

    class Reordered(list):
        def __iter__(self):
            self.reverse()
            return super().__iter__()

    with pytest.raises(ValueError, match="other ones were read before"):
        run_sweep(StubTokenizer(), Reordered(random_batches(8, 4)), {})
