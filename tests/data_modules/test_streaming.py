"""LitData chunks: read in any order, shuffled in part, resumed exactly, shared by ranks, checked."""

import builtins
import json
import multiprocessing
import pickle
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from flextok.data.streaming import chunk_order
from flextok.data.streaming_writer import (
    is_shard_written,
    write_streaming_index,
    write_streaming_shard,
    write_streaming_split,
)
from tests.data_modules.images import encoded_image, keys, noise_image, streaming, write_streaming
from tests.data_modules.recorded_runs import assert_resumes_everywhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """22 images to train on, in chunks of five or so, and 6 for each of the other splits."""
    return write_streaming(tmp_path_factory.mktemp("chunks"))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def ready(path, **changes):
    data = streaming(path, **changes)
    data.setup()
    return data


def chunks(path, split="train"):
    return sorted((path / split).glob("*.bin"))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_image_is_read_with_its_key(folder):
    data = ready(folder, flip=False, eval_batch_size=4)
    assert {split: len(dataset) for split, dataset in data.datasets.items()} == {"train": 22, "val": 6, "test": 6}
    assert keys(data.val_dataloader()) == [["val-0", "val-1", "val-2", "val-3"], ["val-4", "val-5"]]
    sample = data.datasets["train"][0, 17]
    expected = ready(write_one(folder, encoded_image(17)), flip=False).datasets["train"][0, 0]
    assert sample["key"] == "train-17"
    assert torch.equal(sample["image"], expected["image"])


def write_one(folder, image):
    path = folder.parent / "one"
    for split in ("train", "val", "test"):
        write_streaming_split(path / split, [("only", image)] * 4)
    return path


@pytest.mark.parametrize("kind", ["plain", "pil", "no key", "newer"])
def test_what_litdata_itself_writes_is_read(tmp_path, kind):
    from litdata.streaming.writer import BinaryWriter

    for split in ("train", "val", "test"):
        writer = BinaryWriter(str(tmp_path / split), chunk_size=3)
        for number in range(7):
            image = encoded_image(number) if kind != "pil" else noise_image(number)
            sample = {"image": image, "key": f"{number}", "label": number}
            if kind == "no key":
                del sample["key"]
            if kind == "plain":  # a tensor beside it keeps LitData from writing a table
                sample["label"] = torch.zeros(3)
            writer[number] = sample
        writer.done()
        writer.merge()
    data = ready(tmp_path, flip=False, eval_batch_size=7)
    (batch,) = data.val_dataloader()
    names = [f"chunk-0-{n // 3}/{n % 3}" for n in range(7)] if kind == "no key" else list("0123456")
    assert batch["key"] == names
    direct = ready(write_one(tmp_path / "x", encoded_image(5)), flip=False).datasets["val"][0]["image"]
    assert torch.equal(batch["image"][5], direct)


def test_a_data_set_can_be_sent_to_another_process(folder):
    dataset = ready(folder).datasets["train"]
    first = dataset[0, 3]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0, 3]["image"], first["image"])


def test_few_chunks_stay_open(folder):
    dataset = ready(folder, shuffle_chunks=1).datasets["train"]
    for number in range(22):
        dataset[0, number]
    assert len(dataset.source._open_chunks) == dataset.source.max_open == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_unreadable_images_and_counts_them(tmp_path, num_workers):
    data = ready(write_streaming(tmp_path, bad=(3, 9)), batch_size=1, num_workers=num_workers)
    read = sum(keys(data.train_dataloader()), [])
    assert len(read) == 22
    assert set(read) == {f"train-{n}" for n in range(22)} - {"train-3", "train-9"}
    assert data.datasets["train"].source.num_bad == 2


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    data = ready(write_streaming(tmp_path, bad=tuple(range(8))), batch_size=1)
    with pytest.raises(
        ValueError, match=r"of the 22 images in data.path=.*train cannot be read, more than data.max_bad"
    ):
        list(data.train_dataloader())


# --- order ------------------------------------------------------------------------------------------------------------


def order(sizes, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return chunk_order(sizes, **({"streams": 1, "shuffle_chunks": 1} | settings), generator=generator)


@pytest.mark.parametrize("streams", [1, 3, 20])
@pytest.mark.parametrize("sizes", [[5], [1, 2, 3], [7] * 11])
def test_an_order_has_every_number_once(sizes, streams):
    assert order(sizes, streams=streams).sort().values.tolist() == list(range(sum(sizes)))


def test_an_order_is_that_of_its_seed():
    assert torch.equal(order([6] * 9), order([6] * 9))
    assert not torch.equal(order([6] * 9), order([6] * 9, seed=1))


def chunks_in_use(numbers, size):
    """How many chunks are still to be read from, of those that have been read from, at the most at any time."""
    touched = (numbers // size).tolist()
    first, last = {}, {}
    for place, chunk in enumerate(touched):
        first.setdefault(chunk, place)
        last[chunk] = place
    return max(sum(first[c] <= place <= last[c] for c in first) for place in range(len(touched)))


@pytest.mark.parametrize("shuffle_chunks", [1, 4])
def test_only_a_few_chunks_are_read_at_a_time(shuffle_chunks):
    numbers = order([50] * 40, shuffle_chunks=shuffle_chunks)
    assert shuffle_chunks < chunks_in_use(numbers, 50) <= shuffle_chunks + 2
    near = (numbers[:400] // 50).unique()
    assert len(near) >= 8


def test_each_of_as_many_ranks_as_streams_reads_chunks_of_its_own():
    numbers = order([10] * 12, streams=4)
    read = [set((numbers[rank::4] // 10).tolist()) for rank in range(4)]
    assert [len(of_rank) for of_rank in read] == [3] * 4
    assert len(set.union(*read)) == 12


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_workers", "every", "settings"),
    [(0, 1, {}), (0, None, {}), (0, None, {"limit_train_batches": 3}), (2, 4, {}), (2, None, {})],
)
def test_a_run_is_resumed_exactly_in_the_middle_and_at_the_end_of_an_epoch(
    folder, tmp_path, num_workers, every, settings
):
    def make():
        return streaming(folder, num_workers=num_workers)

    assert_resumes_everywhere(tmp_path, make, every=every, max_steps=12, **settings)


@pytest.mark.parametrize("change", [{"shuffle_chunks": 3}, {"streams": 2}])
def test_a_run_with_another_order_is_not_resumed(folder, change):
    state = ready(folder).train_dataloader().state_dict()
    with pytest.raises(ValueError, match=r"shuffled with data.shuffle_chunks=\d, data.streams=\d on \w+, but that of"):
        ready(folder, **change).train_dataloader().load_state_dict(state)


def test_a_run_on_other_chunks_is_not_resumed(folder, copy):
    state = ready(folder).train_dataloader().state_dict()
    write_streaming_split(copy / "train", [(f"{n}", encoded_image(n)) for n in range(22)], shard_bytes=1000)
    with pytest.raises(ValueError, match="resume with the same"):
        ready(copy).train_dataloader().load_state_dict(state)


# --- ranks ------------------------------------------------------------------------------------------------------------


def read_as_rank(rank, world_size, store, path, out, start):
    """Two batches of an epoch, its state, and then all that is left of the epoch."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(store), world_size), rank=rank, world_size=world_size
    )
    loader = ready(path, batch_size=2, streams=2).train_dataloader()
    if start is not None:
        loader.load_state_dict(start)
    source = iter(loader)
    first = keys(islice(source, 2))
    torch.save({"first": first, "state": loader.state_dict(), "rest": keys(source)}, out / f"{rank}.pt")


def read_on_ranks(world_size, path, out, start=None):
    out.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data_modules.test_streaming"])
    arguments = (world_size, out / "store", path, out, start)
    processes = [context.Process(target=read_as_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(timeout=120)
    assert [each.exitcode for each in processes] == [0] * world_size
    return [torch.load(out / f"{rank}.pt") for rank in range(world_size)]


def flat(batches):
    return [key for batch in batches for key in batch]


def test_ranks_read_equally_many_different_images_and_one_rank_goes_on_for_two(folder, tmp_path):
    two = read_on_ranks(2, folder, tmp_path / "two")
    assert [len(rank["first"] + rank["rest"]) for rank in two] == [5, 5]  # 22 images, 2 ranks, batches of 2
    read = [key for rank in two for key in flat(rank["first"] + rank["rest"])]
    assert len(set(read)) == len(read) == 20
    assert two[0]["state"] == two[1]["state"]
    (one,) = read_on_ranks(1, folder, tmp_path / "one", start=two[0]["state"])
    left = flat(one["first"] + one["rest"])
    assert set(left) >= {key for rank in two for key in flat(rank["rest"])}
    assert not set(left) & {key for rank in two for key in flat(rank["first"])}


# --- object storage ---------------------------------------------------------------------------------------------------


def remote(path):
    return f"local:{path}"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_chunks_of_a_url_are_downloaded_when_they_are_needed(folder, tmp_path, num_workers):
    here, there = (ready(path, cache_dir=str(tmp_path), num_workers=num_workers) for path in (folder, remote(folder)))
    assert not list(tmp_path.rglob("*.bin"))
    assert keys(there.train_dataloader()) == keys(here.train_dataloader())
    assert len(list(tmp_path.rglob("*.bin"))) == len(chunks(folder))
    assert not list(tmp_path.rglob("*.part"))


def test_a_cache_keeps_no_more_than_it_may(folder, tmp_path):
    size = max(path.stat().st_size for path in chunks(folder))
    settings = {"cache_dir": str(tmp_path), "shuffle_chunks": 1}
    with pytest.raises(ValueError, match=r"data.cache_gb=1e-06 is too small for data.shuffle_chunks=1.*at least"):
        ready(remote(folder), cache_gb=1e-6, **settings)
    data = ready(remote(folder), cache_gb=2.5 * size / 1e9, **settings)
    for _ in range(2):
        read = flat(keys(data.train_dataloader()))
        assert len(set(read)) == len(read) == 20
        assert 0 < sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) <= 2.5 * size


def test_new_content_of_a_url_gets_a_cache_of_its_own(copy, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    flat(keys(ready(remote(copy), **cache).train_dataloader()))
    write_streaming_split(copy / "train", [(f"new-{n}", encoded_image(50 + n)) for n in range(22)], shard_bytes=1500)
    assert all(key.startswith("new") for key in flat(keys(ready(remote(copy), **cache).train_dataloader())))


def test_a_url_needs_a_cache_and_must_exist(folder, tmp_path):
    with pytest.raises(ValueError, match="data.cache_dir is missing"):
        ready(remote(folder))
    with pytest.raises(ValueError, match=r"local:.*nowhere/train/index.json cannot be downloaded"):
        ready(remote(tmp_path / "nowhere"), cache_dir=str(tmp_path / "cache"))


def test_a_chunk_missing_at_the_url_is_named(copy, tmp_path):
    chunks(copy)[1].unlink()
    data = ready(remote(copy), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"local:.*/train/chunk-0-1.bin cannot be downloaded"):
        list(data.train_dataloader())


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_missing_chunk_is_named_before_training(copy):
    chunks(copy)[2].unlink()
    with pytest.raises(ValueError, match=r"the chunk .*/train/chunk-0-2.bin is damaged: the file is missing"):
        ready(copy)


def test_a_chunk_of_another_size_is_named_before_training(copy):
    chunk = chunks(copy)[2]
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"chunk-0-2.bin is damaged: \d+ bytes, written were \d+"):
        ready(copy)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_chunk_of_other_content_is_named_while_reading_and_counts_as_no_bad_image(copy, num_workers):
    chunk = chunks(copy)[1]
    data = ready(copy, batch_size=1, num_workers=num_workers, max_bad_fraction=1.0)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(ValueError, match=r"chunk-0-1.bin is damaged: it does not begin with its number of samples"):
        list(data.train_dataloader())


def test_other_folders_are_refused(folder, copy, tmp_path):
    with pytest.raises(ValueError, match="is no folder of LitData chunks: it has no index.json"):
        ready(tmp_path)
    with pytest.raises(ValueError, match=r"data.path=.*/elsewhere is no folder of LitData chunks"):
        ready(folder, val_split="elsewhere")
    index = json.loads((copy / "train" / "index.json").read_text())
    for change, message in (
        ({"compression": "zstd"}, "compressed or encrypted"),
        ({"data_format": ["int", "str"]}, "image is stored as 'int'; valid: bytes"),
        ({"data_spec": None}, r"fields \[\]; valid: dictionaries of single values"),
    ):
        (copy / "train" / "index.json").write_text(json.dumps(index | {"config": index["config"] | change}))
        with pytest.raises(ValueError, match=message):
            ready(copy)
    (copy / "train" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        ready(copy)


def test_without_litdata_the_commands_that_install_it_are_named(folder, monkeypatch):
    real_import = builtins.__import__

    def no_litdata(name, *arguments, **others):
        if name.startswith("litdata"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", no_litdata)
    with pytest.raises(ImportError, match=r"pip install 'flextok\[streaming\]' and then pip install --no-deps litdata"):
        ready(folder)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_shards_are_written_in_any_order_and_left_out_when_they_are_there(tmp_path):
    assert not is_shard_written(tmp_path, 1)
    write_streaming_shard(tmp_path, 1, [("b", encoded_image(1))])
    assert is_shard_written(tmp_path, 1)
    with pytest.raises(ValueError, match="has no shard 0: write it first"):
        write_streaming_index(tmp_path, 2)
    write_streaming_shard(tmp_path, 0, [("a", encoded_image(0))])
    write_streaming_index(tmp_path, 2)
    data = ready(
        tmp_path.parent, **dict.fromkeys(("train_split", "val_split", "test_split"), tmp_path.name), batch_size=1
    )
    assert keys(data.val_dataloader()) == [["a"], ["b"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("0.json", "1.json", "chunk-0-0.bin", "chunk-0-1.bin", "index.json")
    ]


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield "a", encoded_image(0)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_streaming_shard(tmp_path, 0, broken())
    with pytest.raises(ValueError, match="shard 0 of .* has no images"):
        write_streaming_shard(tmp_path, 0, [])
    assert list(tmp_path.iterdir()) == []


def test_the_same_images_give_the_same_chunk(tmp_path):
    for name in "ab":
        write_streaming_shard(tmp_path / name, 0, [(f"{n}", encoded_image(n)) for n in range(3)])
    assert (tmp_path / "a/chunk-0-0.bin").read_bytes() == (tmp_path / "b/chunk-0-0.bin").read_bytes()


def test_litdata_reads_what_we_write(folder):
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder / "val"))
    assert [sample["key"] for sample in dataset] == [f"val-{n}" for n in range(6)]
