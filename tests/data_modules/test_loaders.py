"""Orders depend on the seed and the epoch only, and a stored position is continued exactly."""

from itertools import islice

import pytest
import torch

from flextok.data import samplers
from flextok.data.loaders import EvalLoader
from flextok.data.samplers import EvalSampler, TrainSampler
from flextok.data.samples import ImageDataset, collate
from tests.data_modules.images import keys, photos


class Numbers(ImageDataset):
    """As many samples as are asked for, none of which is read."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        raise NotImplementedError


def orders(size: int, *, seed: int = 0, epochs: int = 2, batch_size: int = 4) -> list[list[tuple[int, int]]]:
    sampler = TrainSampler(Numbers(size), batch_size=batch_size, seed=seed)
    result = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        result.append(list(sampler))
    return result


def on_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(samplers, "rank_and_world_size", lambda: (rank, world_size))


def test_an_order_depends_on_seed_and_epoch():
    first, second = orders(20)
    assert orders(20) == [first, second]
    assert sorted(first) == [(0, number) for number in range(20)]
    assert [number for _, number in first] != [number for _, number in second]
    assert [number for _, number in orders(20, seed=1)[0]] != [number for _, number in second]


def test_only_whole_batches_are_drawn():
    assert [len(epoch) for epoch in orders(23)] == [20, 20]


@pytest.mark.parametrize("size", [24, 29, 31])
def test_ranks_divide_an_epoch_into_equal_disjoint_parts(monkeypatch, size):
    parts = []
    for rank in range(3):
        on_rank(monkeypatch, rank, 3)
        parts.append(orders(size, epochs=1)[0])
    assert {len(part) for part in parts} == {8}
    assert len(set().union(*parts)) == 24


def test_ranks_evaluate_everything_once(monkeypatch):
    parts = []
    for rank in range(3):
        on_rank(monkeypatch, rank, 3)
        parts += list(EvalSampler(range(11)))
    assert sorted(parts) == list(range(11))


def loader(num_workers: int = 0):
    data = photos(num_workers=num_workers)
    data.setup()
    return data.train_dataloader()


def batches(source, count):
    return list(islice(source, count))


def assert_same(first, second):
    assert [batch["key"] for batch in first] == [batch["key"] for batch in second]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


def two_epochs():
    uninterrupted = loader()
    return [*uninterrupted, *uninterrupted]


def test_an_epoch_read_to_its_end_is_followed_by_another_one():
    read = two_epochs()
    assert len(read) == 10
    assert {key for batch in read[:5] for key in batch["key"]}.isdisjoint(
        key for batch in read[5:] for key in batch["key"]
    )


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_a_stored_position_is_continued_exactly_with_any_number_of_workers(before, after):
    interrupted = loader(before)
    start = batches(interrupted, 3)
    resumed = loader(after)
    resumed.load_state_dict(interrupted.state_dict())
    assert resumed.state_dict() == interrupted.state_dict()
    assert_same([*start, *resumed, *resumed], two_epochs())


def test_a_position_at_the_end_of_an_epoch_continues_with_the_next():
    interrupted = loader()
    start = batches(interrupted, 5)
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert_same([*start, *resumed], two_epochs())


def test_asking_for_another_epoch_forgets_the_position():
    interrupted = loader()
    batches(interrupted, 3)
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    resumed.sampler.set_epoch(1)
    assert_same(list(resumed), two_epochs()[5:])


def test_an_iteration_that_was_given_up_starts_again():
    source = loader()
    assert_same(batches(source, 2), batches(source, 2))


def test_positions_carry_over_to_another_number_of_ranks(monkeypatch):
    whole = orders(24, epochs=1, batch_size=2)[0]
    on_rank(monkeypatch, 1, 2)
    sampler = TrainSampler(Numbers(24), batch_size=2, seed=0)
    sampler.start_at(8 // sampler.num_replicas)
    assert list(sampler) == whole[8:][1::2]


@pytest.mark.parametrize(
    ("change", "message"), [({"seed": 1}, "data.seed is 1"), ({"train_crops_per_epoch": 23}, "23 images")]
)
def test_a_position_in_another_order_is_refused(change, message):
    data = photos(**change)
    data.setup()
    with pytest.raises(ValueError, match=message):
        data.train_dataloader().load_state_dict(loader().state_dict())


def test_loaders_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    list(loader())
    assert torch.equal(before, torch.get_rng_state())


def test_batches_without_a_readable_image_are_passed_over():
    sample = {"image": torch.zeros(3, 2, 2), "key": "good"}
    samples = [None, None, sample, None, sample]
    source = EvalLoader(samples, batch_size=2, sampler=EvalSampler(samples), collate_fn=collate)
    assert keys(source) == [["good"], ["good"]]
