"""Hugging Face data sets from disk: splits, columns, keys, unreadable images, and no network."""

import builtins
import socket

import datasets
import pytest
import torch

from flextok.data.splits import split_by_hash
from tests.data_modules.images import encoded_image, hugging_face, keys, write_images
from tests.data_modules.recorded_runs import assert_resumes_everywhere


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Tables that `datasets` converts lie below the folder of the test, not below the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def table(count=30, *, start=0, bad=(), **columns):
    encoded = [b"no image" if n in bad else encoded_image(start + n) for n in range(count)]
    rows = {"image": [{"bytes": content, "path": None} for content in encoded], "name": [f"n{n}" for n in range(count)]}
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    made = datasets.Dataset.from_dict(rows, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


@pytest.fixture
def saved(tmp_path):
    """A folder that `save_to_disk` wrote: 26 images to train on and 6 for validation."""
    path = tmp_path / "saved"
    datasets.DatasetDict({"train": table(26), "validation": table(6, start=100)}).save_to_disk(path)
    return path


def ready(path, **changes):
    data = hugging_face(path, **changes)
    data.setup()
    return data


def flat(loader):
    return [key for batch in keys(loader) for key in batch]


def test_named_splits_are_taken_and_the_others_held_out(saved):
    data = ready(saved, val_split="validation", eval_batch_size=4)
    assert keys(data.val_dataloader()) == [[f"validation/{n}" for n in range(4)], ["validation/4", "validation/5"]]
    train, test = data.datasets["train"], data.datasets["test"]
    rows = [*train.numbers, *test.numbers]
    assert sorted(rows) == list(range(26))
    assert len(test) >= 1
    assert set(flat(data.train_dataloader())) <= {f"train/{n}" for n in train.numbers}


def test_held_out_rows_stay_held_out_when_rows_are_added(tmp_path):
    splits = []
    for count in (200, 300):
        table(count).save_to_disk(tmp_path / str(count))
        splits.append({s: set(d.numbers) for s, d in ready(tmp_path / str(count)).datasets.items()})
    assert all(splits[0][split] <= splits[1][split] for split in splits[0])
    assert sum(map(len, splits[1].values())) == 300


def test_one_held_out_part_leaves_the_rest_for_training():
    names = [f"n{n}" for n in range(400)]
    parts = split_by_hash(names, {"val": 0.2})
    assert set(parts) == {"train", "val"}
    assert sorted(parts["train"] + parts["val"]) == list(range(400))
    assert 50 < len(parts["val"]) < 110


def test_images_are_those_of_the_table(saved):
    sample = ready(saved, flip=False, key_column="name", val_split="validation").datasets["val"][2]
    plain = ready(saved, flip=False, val_split="validation").datasets["val"][2]
    assert (sample["key"], plain["key"]) == ("n2", "validation/2")
    assert torch.equal(sample["image"], plain["image"])
    assert sample["image"].shape == (3, 8, 8)
    assert -1 <= sample["image"].min() < sample["image"].max() <= 1


def test_a_column_of_bytes_holds_images_too(tmp_path):
    made = datasets.Dataset.from_dict({"jpg": [encoded_image(n) for n in range(20)]})
    made.save_to_disk(tmp_path / "saved")
    table(20).save_to_disk(tmp_path / "other")
    data, other = ready(tmp_path / "saved", image_column="jpg"), ready(tmp_path / "other")
    assert torch.equal(data.datasets["val"][0]["image"], other.datasets["val"][0]["image"])


def test_a_folder_of_parquet_files_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    table(20).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    data = ready(tmp_path / "data")
    assert len(flat(data.train_dataloader())) == 4 * (len(data.datasets["train"]) // 4)


def test_a_folder_of_images_is_read(tmp_path):
    write_images(tmp_path / "images", 20)
    data = ready(tmp_path / "images")
    assert sum(map(len, data.datasets.values())) == 20
    assert flat(data.train_dataloader())


@pytest.mark.parametrize(("num_workers", "every"), [(0, 1), (0, None), (2, 4), (2, None)])
def test_a_run_is_resumed_exactly(saved, tmp_path, num_workers, every):
    def make():
        return hugging_face(saved, num_workers=num_workers)

    assert_resumes_everywhere(tmp_path, make, every=every, max_steps=9)


def test_unreadable_images_are_replaced_in_training_left_out_in_evaluation_and_counted(tmp_path):
    parts = {"train": table(20, bad=(2, 5)), "validation": table(6, bad=(1,)), "test": table(6)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    data = ready(tmp_path / "saved", batch_size=1, val_split="validation", test_split="test")
    read = flat(data.train_dataloader())
    assert len(read) == 20
    assert set(read) == {f"train/{n}" for n in range(20)} - {"train/2", "train/5"}
    assert data.datasets["train"].source.num_bad == 2
    assert flat(data.val_dataloader()) == [f"validation/{n}" for n in (0, 2, 3, 4, 5)]


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    table(20, bad=range(12)).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"of the 20 images in data.path=.*saved cannot be read, more than data.max_bad"
    ):
        list(ready(tmp_path / "saved", batch_size=1).train_dataloader())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "img"}, "data.image_column='img' is not in data.path=.*; valid: one of image, name"),
        ({"image_column": "name"}, "data.image_column='name' of .* holds .*; valid: a column of images such as image"),
        ({"key_column": "id"}, "data.key_column='id' is not in data.path=.*; valid: one of image, name"),
        ({"val_split": "val"}, "data.val_split='val' is not in .*saved; valid: train, validation"),
        ({"val_fraction": 0.0}, "data.val_fraction=0.0 and data.test_fraction=0.1 cannot be used"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        ready(saved, **changes)


def test_keys_must_differ(tmp_path):
    table(6, id=["a", "b", "c", "b", "d", "e"]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="data.key_column='id' of .* has 'b' 2 times"):
        ready(tmp_path / "saved", key_column="id")


@pytest.mark.parametrize("path", ["/no/such/folder", "./data", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(path):
    with pytest.raises(
        ValueError, match=f"data.path='{path}' cannot be loaded: there is no such folder; valid: a folder"
    ):
        ready(path)


def test_without_a_network_a_local_folder_is_asked_for_at_once(monkeypatch):
    def no_network(*arguments, **others):
        raise socket.gaierror("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(
        ValueError, match=r"https://.* cannot be reached .*; give a local folder, or set HF_HUB_OFFLINE=1"
    ):
        ready("owner/name")


def test_offline_only_what_was_downloaded_is_used():
    with pytest.raises(ValueError, match=r"data.path='owner/name' cannot be loaded: .*; valid: a folder that"):
        ready("owner/name")


def test_without_the_library_the_extra_is_named(saved, monkeypatch):
    real_import = builtins.__import__

    def no_datasets(name, *arguments, **others):
        if name == "datasets":
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ImportError, match=r"pip install 'flextok\[hf\]'"):
        ready(saved)
