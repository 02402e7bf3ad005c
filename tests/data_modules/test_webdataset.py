"""Tar shards as data: who reads what, in which order, what comes after an interruption, and what damage does."""

import io
import json
import shutil
import tarfile
from itertools import islice

import pytest
import torch
from omegaconf import OmegaConf

from flextok.cli import main
from flextok.data import samplers, shard_images, shard_streams, webdataset
from flextok.data.webdataset import WebDatasetDataModule
from flextok.evaluation.run import open_split
from flextok.evaluation.source import find_source
from flextok.training.run import run
from tests.data_modules.images import COMMON, image_folder, keys, noise_image, write_images
from tests.data_modules.recorded_runs import assert_resumes_everywhere
from tests.training.support import repeatable, small_config
from tests.training.test_distributed import launch

FRACTIONS = {"val_fraction": 0.1, "test_fraction": 0.1}


def opened(stage="fit", **changes):
    settings = {
        **dict.fromkeys(("root", "train", "val", "test", "samples_per_epoch")),
        **{"shuffle_buffer": 6, "max_bad_fraction": 0.1, "flip": True, "image_size": 8},
        **COMMON,
    }
    data = WebDatasetDataModule(**(settings | changes))
    data.setup(stage)
    return data


def on_rank(monkeypatch, rank, world_size):
    for module in (samplers, shard_streams, webdataset):
        monkeypatch.setattr(module, "rank_and_world_size", lambda: (rank, world_size))


def prepare(images, shards, *options):
    fractions = ("--val-fraction", "0.1", "--test-fraction", "0.1")
    assert main(["prepare", str(images), str(shards), "--shard-size", "7", "--workers", "0", *fractions, *options]) == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 80)
    return folder


@pytest.fixture(scope="module")
def root(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(images, folder)
    return folder


def flat(batches):
    return [key for batch in batches for key in batch["key"]]


def png(number):
    file = io.BytesIO()
    noise_image(number).save(file, format="PNG")
    return file.getvalue()


def write_shard(path, names, **others):
    with tarfile.open(path, "w") as archive:
        for name, content in [*((f"{name}.png", png(n)) for n, name in enumerate(names)), *others.items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Shards of 1, 2, ... 6 samples whose names repeat, and one to validate on."""
    folder = tmp_path_factory.mktemp("foreign")
    for number in range(6):
        write_shard(folder / f"train-{number:03d}.tar", [f"{n:04d}" for n in range(number + 1)])
    write_shard(folder / "val.tar", [f"{n:04d}" for n in range(5)])
    return {"train": f"{folder}/train-{{000..005}}.tar", "val": f"{folder}/val.tar", "samples_per_epoch": 24}


# --- order ------------------------------------------------------------------------------------------------------------


def test_shards_hold_the_splits_and_images_of_the_folder_they_are_made_of(images, root):
    ours, theirs = opened(root=root, flip=False), image_folder(images, flip=False, **FRACTIONS)
    theirs.setup()
    train = theirs.datasets["train"]
    expected = {sample["key"]: sample["image"] for sample in (train[number] for number in range(len(train)))}
    for batch in ours.train_dataloader():
        for key, image in zip(batch["key"], batch["image"], strict=True):
            assert torch.equal(image, expected[key])
    for name in ("val", "test"):
        ordered, folder = ours.datasets[name], theirs.datasets[name]
        assert len(ordered) == len(folder)
        for number in range(len(folder)):
            assert ordered[number]["key"] == folder[number]["key"]
            assert torch.equal(ordered[number]["image"], folder[number]["image"])


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 0), (1, 3), (2, 0), (3, 2), (2, 8)])
def test_ranks_and_workers_read_an_epoch_once_in_equal_parts(root, monkeypatch, num_ranks, num_workers):
    read, lengths = [], set()
    for rank in range(num_ranks):
        on_rank(monkeypatch, rank, num_ranks)
        data = opened(root=root, num_workers=num_workers)
        # The streams of all workers, read here: no process is needed to see what each of them gives.
        dataset, sampler = data.datasets["train"], data.train_dataloader().sampler
        assert dataset.num_streams == max(1, num_workers)
        found = [dataset[index]["key"] for index in sampler]
        lengths.add(len(found))
        read += found
    total = len(dataset)
    assert lengths == {total // (4 * num_ranks) * 4}
    assert len(read) == len(set(read))
    assert total - len(read) < 4 * num_ranks


def test_an_order_depends_on_seed_and_epoch(root):
    loader, again, other = (opened(root=root, seed=seed).train_dataloader() for seed in (0, 0, 1))
    first, second = flat(loader), flat(loader)
    assert (flat(again), flat(again)) == (first, second)
    assert first != second
    assert flat(other) != first
    in_shards = [opened(root=root).datasets["train"].in_order[number]["key"] for number in range(len(first))]
    neighbours = set(zip(in_shards, in_shards[1:], strict=False))
    assert sum(pair in neighbours for pair in zip(first, first[1:], strict=False)) < len(first) / 2


def test_flips_depend_on_epoch_and_key(root):
    data, plain = opened(root=root), opened(root=root, flip=False)
    upright = {}
    for batch in plain.train_dataloader():
        upright |= dict(zip(batch["key"], batch["image"], strict=True))
    loader = data.train_dataloader()
    flipped = []
    for _ in range(2):
        flipped.append({})
        for batch in loader:
            for key, image in zip(batch["key"], batch["image"], strict=True):
                if key in upright:
                    flipped[-1][key] = not torch.equal(image, upright[key])
    assert 0 < sum(flipped[0].values()) < len(flipped[0])
    both = flipped[0].keys() & flipped[1].keys()
    assert any(flipped[0][key] != flipped[1][key] for key in both)
    for batch in opened(root=root, num_workers=2).train_dataloader():
        for key, image in zip(batch["key"], batch["image"], strict=True):
            if key in flipped[0]:
                assert flipped[0][key] == (not torch.equal(image, upright[key]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_reads_everything_once_in_order(root, monkeypatch, num_workers):
    data = opened("test", root=root, num_workers=num_workers)
    expected = [data.datasets["test"][number]["key"] for number in range(len(data.datasets["test"]))]
    assert len(expected) == len(set(expected)) > 3
    assert flat(data.test_dataloader()) == expected
    parts = []
    for rank in range(2):
        on_rank(monkeypatch, rank, 2)
        parts.append(flat(opened("test", root=root, num_workers=num_workers, eval_batch_size=3).test_dataloader()))
    assert parts == [expected[::2], expected[1::2]]


# --- resuming ---------------------------------------------------------------------------------------------------------


def assert_same(first, second):
    assert [batch["key"] for batch in first] == [batch["key"] for batch in second]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stored_position_is_continued_exactly(root, num_workers):
    whole = opened(root=root, num_workers=num_workers).train_dataloader()
    batches = [*whole, *whole]
    for done in (0, 1, 5, len(whole)) if num_workers == 0 else (5,):
        interrupted = opened(root=root, num_workers=num_workers).train_dataloader()
        list(islice(interrupted, done))
        resumed = opened(root=root, num_workers=num_workers).train_dataloader()
        resumed.load_state_dict(json.loads(json.dumps(interrupted.state_dict())))
        rest = [*resumed, *resumed] if done < len(whole) else list(resumed)
        assert_same(rest, batches[done:])


def test_what_was_done_is_passed_over_without_decoding(root, monkeypatch):
    interrupted = opened(root=root).train_dataloader()
    list(islice(interrupted, 9))
    data = opened(root=root)
    resumed = data.train_dataloader()
    resumed.load_state_dict(interrupted.state_dict())
    decoded = []
    monkeypatch.setattr(shard_images, "decode", lambda file: decoded.append(0) or noise_image(0))
    assert len(list(resumed)) == len(resumed) - 9
    assert len(decoded) == 4 * (len(resumed) - 9)


def test_another_division_is_said_and_no_error(root, caplog):
    interrupted = opened(root=root).train_dataloader()
    list(islice(interrupted, 5))
    resumed = opened(root=root, num_workers=2, batch_size=3).train_dataloader()
    resumed.load_state_dict(interrupted.state_dict())
    assert "1 streams before, 2 now; 4 batch_size before, 3 now" in caplog.text
    resumed.sampler.start_at(20)
    assert next(iter(resumed.sampler)) == (0, 18)
    caplog.clear()
    opened(root=root).train_dataloader().load_state_dict(interrupted.state_dict())
    assert caplog.text == ""


@pytest.mark.parametrize(("num_workers", "every"), [(0, 5), pytest.param(2, 5, marks=pytest.mark.slow), (0, None)])
def test_lightning_resumes_with_the_remaining_batches(root, tmp_path, num_workers, every):
    def make():
        # Six batches are an epoch.
        return WebDatasetDataModule(
            **{"root": root, "train": None, "val": None, "test": None, "samples_per_epoch": None, "shuffle_buffer": 9},
            **{"max_bad_fraction": 0.1, "flip": True, "image_size": 8, "seed": 0, "batch_size": 10},
            num_workers=num_workers,
        )

    assert_resumes_everywhere(tmp_path, make, every=every, max_steps=12)


def training(folder, root, *overrides):
    data = (
        "data=webdataset",
        f"data.root={root}",
        "data.batch_size=16",
        "data.num_workers=0",
        "data.eval_batch_size=4",
    )
    return small_config(folder, *data, "callbacks.pictures=null", *overrides)


def test_an_interrupted_run_continues_exactly(root, tmp_path):
    whole = run(training(tmp_path / "whole", root))
    first = training(tmp_path / "first", root)
    first.trainer.max_steps = 6
    run(first)
    second = training(tmp_path / "second", root, f"ckpt_path={tmp_path / 'first'}")
    assert repeatable(run(second)) == repeatable(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepared", "foreign"])
def test_two_processes_with_uneven_shards_finish_together(root, foreign, tmp_path, kind):
    if kind == "prepared":
        where = (f"data.root={root}", "data.num_workers=2")
    else:
        where = (f'data.train="{foreign["train"]}"', f"data.val={foreign['val']}", "data.samples_per_epoch=24")
        where += ("data.num_workers=1",)
    data = ("data=webdataset", *where, "data.batch_size=4", "data.eval_batch_size=2", "callbacks.pictures=null")
    assert launch(tmp_path, "trainer=ddp_cpu", *data, "trainer.limit_val_batches=null", "trainer.max_steps=20") == [
        0,
        0,
    ]


# --- anybody's shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_uneven_shards_begin_again_and_give_every_rank_as_many_batches(foreign, monkeypatch, num_ranks):
    found = []
    for rank in range(num_ranks):
        on_rank(monkeypatch, rank, num_ranks)
        loader = opened(**foreign).train_dataloader()
        batches = keys(loader)
        assert len(batches) == len(loader) == 24 // (4 * num_ranks)
        found += [key for batch in batches for key in batch]
    assert all(key.startswith("train-00") for key in found)
    if num_ranks == 1:  # 21 samples in all, and three of them again
        assert len(set(found)) == 21


@pytest.mark.parametrize("form", ["{}", "file:{}", "pipe:cat {}"])
def test_paths_and_urls_give_the_same(foreign, form):
    plain = opened(**foreign)
    data = opened(train=[form.format(foreign["train"])], val=form.format(foreign["val"]), samples_per_epoch=24)
    assert keys(data.train_dataloader()) == keys(plain.train_dataloader())
    assert flat(data.val_dataloader()) == [f"val.tar/{n:04d}" for n in range(5)]


@pytest.mark.parametrize("form", ["file:{}", "pipe:cat {}"])
def test_a_prepared_folder_may_be_a_url(root, form):
    data = opened(root=form.format(root))
    assert keys(data.train_dataloader()) == keys(opened(root=root).train_dataloader())


def test_stars_name_shards_in_the_order_of_their_names(foreign):
    by_star = opened(**(foreign | {"train": foreign["train"].replace("{000..005}", "*")}))
    assert by_star.datasets["train"].shards.urls == opened(**foreign).datasets["train"].shards.urls


def test_too_few_shards_for_all_workers_are_refused_and_prepared_ones_shared(foreign, root, monkeypatch):
    on_rank(monkeypatch, 0, 2)
    with pytest.raises(ValueError, match=r"names 6 shards, but 2 ranks with data.num_workers=4 .* each worker, 8;"):
        opened(**foreign, num_workers=4)
    assert len(opened(root=root, num_workers=16, batch_size=1).train_dataloader()) > 0


def test_other_files_of_a_sample_are_passed_over(tmp_path):
    write_shard(tmp_path / "a.tar", [], **{"x.txt": b"a cat", "x.JPG": png(1), "y.cls": b"3", "z.seg.png": png(2)})
    loader = opened("validate", val=str(tmp_path / "a.tar")).val_dataloader()
    assert flat(loader) == ["a.tar/x", "a.tar/z"]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_corrupt_images_are_replaced_in_training_and_left_out_in_evaluation(tmp_path, caplog):
    bad = {"bad0.png": b"", "bad1.png": png(0)[:60]}
    write_shard(tmp_path / "train.tar", [f"{n}" for n in range(12)], **bad)
    write_shard(tmp_path / "val.tar", ["a", "b"], **bad)
    urls = {"train": str(tmp_path / "train.tar"), "val": str(tmp_path / "val.tar"), "samples_per_epoch": 28}
    data = opened(**urls, max_bad_fraction=0.5)
    loader = data.train_dataloader()
    read = flat(loader) + flat(loader)
    assert len(read) == 56
    assert {key.split("/")[1] for key in read} == {f"{n}" for n in range(12)}
    assert data.datasets["train"].decoder.num_bad == 2
    assert sum("skipping an unreadable image: train.tar/bad" in message for message in caplog.messages) == 2
    assert flat(data.val_dataloader()) == ["val.tar/a", "val.tar/b"]
    resumed = opened(**urls, max_bad_fraction=0.5).train_dataloader()
    resumed.load_state_dict({**loader.state_dict(), "epoch": 0, "position": 12})
    assert flat(resumed) == read[12:28]
    with pytest.raises(ValueError, match=r"2 of 28 images cannot be read.*data.max_bad_fraction=0.01.*train.tar/bad"):
        flat(opened(**urls, max_bad_fraction=0.01).train_dataloader())


def test_only_corrupt_images_are_no_endless_search(tmp_path):
    write_shard(tmp_path / "a.tar", [], **{"x.png": b"", "y.txt": b""})
    data = opened(train=str(tmp_path / "a.tar"), val=str(tmp_path / "a.tar"), samples_per_epoch=4, max_bad_fraction=1)
    with pytest.raises(ValueError, match="none of the 5 training images"):
        next(iter(data.train_dataloader()))
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match="hold no sample"):
        next(iter(data.train_dataloader()))


DAMAGE = ["cut off", "cut between", "damaged header", "empty", "missing"]


def damage(path, kind):
    content = bytearray(path.read_bytes())
    second = 512 + -(-int(content[124:135], 8) // 512) * 512
    if kind == "damaged header":
        content[second + 10] ^= 1
    path.write_bytes(content[: {"cut off": second + 600, "cut between": second, "empty": 0}.get(kind)])
    if kind == "missing":
        path.unlink()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("form", ["{}", "pipe:cat {}"])
def test_a_damaged_shard_is_named(foreign, tmp_path, kind, form):
    write_shard(tmp_path / "train-0.tar", ["a", "b", "c"])
    path = form.format(tmp_path / "train-0.tar")
    data = opened(train=path, val=foreign["val"], samples_per_epoch=8)
    damage(tmp_path / "train-0.tar", kind)
    with pytest.raises(ValueError, match=r"the shard .*train-0.tar cannot be read, or is damaged: "):
        list(data.train_dataloader())


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_prepared_shard_is_named_before_training(root, tmp_path, kind):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "train-000002.tar", kind)
    with pytest.raises(ValueError, match="train-000002.tar"):
        list(opened(root=tmp_path).train_dataloader())


def test_a_shard_with_fewer_samples_than_the_index_says_is_named(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    size = (tmp_path / "train-000001.tar").stat().st_size
    write_shard(tmp_path / "train-000001.tar", ["a"])
    with (tmp_path / "train-000001.tar").open("ab") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match="train-000001.tar is damaged: it has 1 samples, written were 7"):
        list(opened(root=tmp_path).train_dataloader())


def test_an_unfinished_folder_is_refused(root, tmp_path):
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    index = json.loads((root / "index.json").read_text())
    index["splits"]["train"]["shards"].pop()
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"split train has \d+ of \d+ shards; run `flextok prepare` again"):
        opened(root=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "data.root=None with 0 of data.train"),
        ({"root": "x", "val": "y"}, "data.root='x' with 1 of data.train"),
        ({"train": "x", "val": "x"}, "data.samples_per_epoch=None with data.train='x'"),
        ({"root": "x", "samples_per_epoch": 3}, "data.samples_per_epoch=3 with data.train=None"),
        ({"root": "x", "shuffle_buffer": 0}, "data.shuffle_buffer is 0: it must be at least 1"),
        ({"root": "x", "max_bad_fraction": 2}, "data.max_bad_fraction is 2"),
        ({"root": "nowhere"}, "data.root='nowhere' is no folder of image shards"),
        ({"root": "file:/nowhere"}, "file:/nowhere/index.json cannot be read"),
        ({"val": "nowhere-{0..3}.tar"}, "data.val: no such file: nowhere-0.tar"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        opened(**changes)


def test_a_missing_split_is_named(foreign):
    with pytest.raises(ValueError, match="data.test is missing"):
        opened("test", **foreign)
    with pytest.raises(ValueError, match="data.train is missing"):
        opened(val=foreign["val"])


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_opens_val_and_test(root):
    config = {"_target_": "flextok.data.webdataset.WebDatasetDataModule", "root": str(root), "image_size": 8, **COMMON}
    config |= {"shuffle_buffer": 1, "max_bad_fraction": 0.0, "flip": False}
    config |= dict.fromkeys(("train", "val", "test", "samples_per_epoch"))
    val, test = (flat(open_split(config, split)) for split in ("val", "test"))
    assert val
    assert test
    assert not set(val) & set(test)


def test_a_run_from_elsewhere_may_not_run_commands(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 1}, tmp_path / "checkpoints/last.ckpt")
    for url in ("pipe:touch x", ["a.tar", "pipe:touch x"], "a.tar::pipe:touch x"):
        data = {"_target_": "flextok.data.webdataset.WebDatasetDataModule", "val": url}
        OmegaConf.save(OmegaConf.create({"model": {}, "data": data}), tmp_path / "config.yaml")
        with pytest.raises(ValueError, match=r"pipe: is a command.*choose the data yourself"):
            find_source(str(tmp_path), runs=tmp_path).run_data()


def test_latents_are_made_of_every_image(root, tmp_path):
    overrides = ("vae=pixel", "data=webdataset", f"data.root={root}", "data.image_size=8", "data.num_workers=0")
    assert main(["--traceback", "latents", str(tmp_path / "out"), *overrides, "--variants", "2"]) == 0
    index = json.loads((tmp_path / "out/index.json").read_text())
    total = sum(split["samples"] for split in index["splits"].values())
    assert total == 80
