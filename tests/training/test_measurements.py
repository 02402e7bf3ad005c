"""What callbacks make of a step: loss by bucket, use of the codebook, pace; and when they write it."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.profilers import Profiler

from flextok.evaluation.tokens import entropy_bits, token_statistics
from flextok.model.packed_list import PackedList
from flextok.training import pace as pace_module
from flextok.training.codebook import CodebookUsage
from flextok.training.loss_buckets import LossBuckets, keep_k_ends
from flextok.training.measurement import STEPS_AT_ONCE
from flextok.training.objective import PASSES_KEY, FlowPass
from flextok.training.pace import FetchClock, TrainingPace


class Recorder:
    """A logger of lists."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


def flow_pass(errors, times, kept):
    return FlowPass(torch.tensor(errors), torch.tensor(times), torch.tensor(kept))


def module_with(*passes, tokens=None, levels=(3, 2), num_registers=6):
    regularizer = SimpleNamespace(levels=list(levels))
    model = SimpleNamespace(num_registers=num_registers, token_write_key="tokens", regularizer=regularizer)
    return SimpleNamespace(model=model, observed={PASSES_KEY: list(passes), "tokens": tokens})


def collect(measurement, *modules):
    measurement.collect([measurement.observe(module) for module in modules])


def trainer_at(step, recorder, **options):
    usual = {"log_every_n_steps": 2, "is_global_zero": True, "world_size": 1}
    return SimpleNamespace(global_step=step, loggers=[recorder], **usual | options)


# --- loss by bucket ---------------------------------------------------------------------------------------------------


def test_buckets_of_keep_k_end_at_powers_of_two_and_at_all_registers():
    assert keep_k_ends(6) == [1, 2, 4, 6]
    assert keep_k_ends(8) == [1, 2, 4, 8]
    assert keep_k_ends(1) == [1]


def test_losses_are_averaged_by_number_of_tokens_and_by_time():
    buckets = LossBuckets(num_times=2)
    first = module_with(flow_pass([1.0, 2.0, 4.0], [0.1, 0.6, 1.0], [1, 3, 0]))
    collect(buckets, first, module_with(flow_pass([6.0, 8.0], [0.0, 0.5], [4, 6])))
    assert buckets.take() == {
        "train/flow_loss/null": 4.0,
        "train/flow_loss/k1": 1.0,
        "train/flow_loss/k3-4": 4.0,
        "train/flow_loss/k5-6": 8.0,
        "train/flow_loss/t0-0.5": 3.5,
        "train/flow_loss/t0.5-1": pytest.approx(14 / 3),
    }
    assert buckets.take() == {}


def test_all_passes_of_the_decoder_count():
    buckets = LossBuckets(num_times=1)
    collect(buckets, module_with(flow_pass([1.0], [0.5], [6]), flow_pass([3.0], [0.5], [2])))
    assert buckets.take() == {"train/flow_loss/k2": 3.0, "train/flow_loss/k5-6": 1.0, "train/flow_loss/t0-1": 2.0}


def test_an_objective_that_leaves_nothing_is_no_mistake():
    module = module_with()
    module.observed = {}
    for measurement in (LossBuckets(num_times=1), CodebookUsage()):
        assert measurement.observe(module) is None
        assert measurement.take() == {}


# --- codebook ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_the_codebook_is_judged_as_evaluation_does_by_the_tokens_that_were_seen(ragged):
    ids = torch.tensor([[0, 1, 2, 5], [3, 3, 1, 5], [4, 4, 4, 4]])
    tokens = list(ids.split(1)) if ragged else PackedList(ids)
    usage = CodebookUsage()
    collect(usage, module_with(flow_pass([0.0] * 3, [0.0] * 3, [3, 2, 0]), tokens=tokens))
    seen = torch.tensor([0, 1, 2, 3, 3])
    numbers, expected = usage.take(), token_statistics(seen[None], 6)
    assert numbers.pop("train/codebook/entropy_bits_channel_0") == pytest.approx(entropy_bits(seen % 3), abs=1e-6)
    assert numbers.pop("train/codebook/entropy_bits_channel_1") == pytest.approx(entropy_bits(seen // 3), abs=1e-6)
    assert {name.removeprefix("train/codebook/") for name in numbers} <= expected.keys()
    for name, number in numbers.items():
        assert number == pytest.approx(expected[name.removeprefix("train/codebook/")], rel=1e-5)
    assert usage.take() == {}


def test_of_several_passes_the_one_that_sees_most_counts():
    usage = CodebookUsage()
    passes = flow_pass([0.0], [0.0], [4]), flow_pass([0.0], [0.0], [1])
    collect(usage, module_with(*passes, tokens=PackedList(torch.tensor([[0, 1, 2, 3]]))))
    assert usage.take()["train/codebook/perplexity"] == pytest.approx(4.0)


# --- when -------------------------------------------------------------------------------------------------------------


def test_numbers_are_written_at_logged_steps_once_however_many_batches_make_a_step():
    buckets, recorder = LossBuckets(num_times=1), Recorder()
    module = module_with(flow_pass([2.0], [0.5], [1]))
    buckets.on_train_start(trainer_at(0, recorder), module)
    for step in (0, 1, 1, 2, 2, 3, 3, 4):  # two batches are accumulated
        buckets.on_train_batch_end(trainer_at(step, recorder), module, None, None, 0)
    assert [step for step, _ in recorder.rows] == [1, 3]
    assert recorder.rows[0][1] == {"train/flow_loss/k1": 2.0, "train/flow_loss/t0-1": 2.0}


def test_steps_between_logged_ones_all_count():
    buckets, recorder = LossBuckets(num_times=1), Recorder()
    steps = 2 * STEPS_AT_ONCE + 3
    for step in range(1, steps + 1):
        module = module_with(flow_pass([float(step)], [0.5], [1]))
        buckets.on_train_batch_end(trainer_at(step, recorder, log_every_n_steps=steps), module, None, None, 0)
    assert recorder.rows == [
        (steps - 1, dict.fromkeys(("train/flow_loss/k1", "train/flow_loss/t0-1"), (1 + steps) / 2))
    ]


@pytest.mark.parametrize("options", [{"is_global_zero": False}, {"loggers": []}])
def test_nothing_is_collected_that_nobody_writes(options):
    buckets, recorder = LossBuckets(num_times=1), Recorder()
    trainer = trainer_at(2, recorder)
    vars(trainer).update(options)
    buckets.on_train_batch_end(trainer, module_with(flow_pass([2.0], [0.5], [1])), None, None, 0)
    assert buckets.take() == {}
    assert recorder.rows == []


# --- pace -------------------------------------------------------------------------------------------------------------


class Silent(Profiler):
    """A profiler that only counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def start(self, action_name):
        self.calls += 1

    def stop(self, action_name):
        self.calls += 1


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is what the host's clock shows."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(pace_module, "perf_counter", lambda: clock.now)
    return clock


def test_the_clock_of_the_loader_counts_fetching_alone_and_passes_everything_on(clock):
    profiler = Silent()
    fetching = FetchClock(profiler)
    for action in ("[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"):
        fetching.start(action)
        clock.now += 2.0
        fetching.stop(action)
    assert fetching.seconds == 2.0
    assert fetching.calls == profiler.calls == 4


def test_pace_is_that_of_the_steps_since_it_was_logged_without_validation(clock):
    pace, logged = TrainingPace(peak_flops=1000.0), []
    module = SimpleNamespace(modules=list, log_dict=logged.append)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = trainer_at(0, None, world_size=2, profiler=Silent(), precision="32-true", strategy=strategy)
    profiler = trainer.profiler
    pace.on_fit_start(trainer, module)
    pace.on_train_start(trainer, module)

    def step(seconds, waited):
        trainer.profiler.start("train_dataloader_next")
        clock.now += waited
        trainer.profiler.stop("train_dataloader_next")
        clock.now += seconds - waited
        pace.add(tokens=50, flops=600)
        trainer.global_step += 1
        pace.on_train_batch_end(trainer, module, None, {"key": ["a"] * 8}, 0)

    step(1000.0, 900.0)  # warms up
    step(2.0, 0.5)
    clock.now += 500.0
    pace.on_validation_end(trainer, module)
    step(1.0, 0.25)
    step(3.0, 0.0)
    first, second = logged
    assert first["train/images_per_second"] == 2 * 8 / 2.0
    assert first["train/tokens_per_second"] == 2 * 50 / 2.0
    assert first["train/mfu"] == pytest.approx(600 / 2.0 / 1000)
    assert second["train/step_seconds"] == 2.0
    assert second["train/data_wait_share"] == 0.25 / 4.0
    assert 0 < second["memory/host_peak_gib"] < math.inf
    pace.teardown(trainer, module, "fit")
    assert trainer.profiler is profiler


def test_the_mfu_is_left_out_where_no_peak_is_known():
    assert pace_module._known_peak(torch.device("cpu"), "bf16-mixed") is None
