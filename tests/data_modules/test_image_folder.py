"""Folders as people have them: nested, linked, small, and with files that are no images."""

import logging

import pytest
import torch

from flextok.data.image_files import list_images, split_files
from flextok.data.splits import hash_fraction
from tests.data_modules.images import image_folder, keys, spoil, write_images

KINDS = ["empty", "truncated", "text", "wrong format", "damaged header"]


def names(count):
    return [f"folder/{number}.jpg" for number in range(count)]


def split_names(paths, **fractions):
    splits = split_files(paths, **({"val_fraction": 0.1, "test_fraction": 0.1} | fractions))
    return {split: {paths[number] for number in numbers} for split, numbers in splits.items()}


def test_listing_is_sorted_nested_and_knows_the_suffixes(tmp_path):
    for name in ["b.JPG", "a/c.png", "a/.hidden.png", ".cache/d.png", "a/b/e.WebP", "notes.txt", "f.jpeg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a/b/e.WebP", "a/c.png", "b.JPG", "f.jpeg"]


def test_linked_folders_are_followed_and_circles_are_not(tmp_path):
    write_images(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(root)
    assert list_images(root) == ["link/class_0/000.png"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_missing_or_empty_folder_is_refused_with_the_suffixes(tmp_path, exists):
    root = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(ValueError, match=r"data.root=.*\.jpg, \.jpeg, \.png, \.webp"):
        image_folder(root).setup()


def test_hashes_are_the_same_on_every_machine_and_spread_evenly():
    assert hash_fraction("a.jpg") == 0.9932851797039555
    assert sum(hash_fraction(name) < 0.25 for name in names(4000)) == pytest.approx(1000, abs=100)


def test_files_keep_their_split_when_others_come_or_the_order_changes():
    few, many = split_names(names(500)), split_names(names(1000)[::-1])
    assert all(few[split] <= many[split] for split in few)
    assert sum(map(len, many.values())) == 1000
    assert 60 < len(many["val"]) < 140


@pytest.mark.parametrize("count", [3, 4, 20])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.49])
def test_small_folders_have_an_image_in_every_split(count, fraction):
    splits = split_names(names(count), val_fraction=fraction, test_fraction=fraction)
    assert all(splits.values())
    assert sum(map(len, splits.values())) == count


def test_two_images_are_too_few():
    with pytest.raises(ValueError, match="there are 2 images for train, val, test"):
        split_names(names(2))


@pytest.mark.parametrize(("val", "test"), [(0, 0.1), (0.1, 0), (0.5, 0.5), (-0.1, 0.1)])
def test_impossible_fractions_are_refused(val, test):
    with pytest.raises(ValueError, match=r"data.val_fraction=.* and data.test_fraction=.*: each positive"):
        split_names(names(9), val_fraction=val, test_fraction=test)


def test_folders_named_after_the_splits_are_the_splits():
    paths = ["test/a.png", "train/a.png", "train/x/b.png", "val/a.png"]
    assert split_names(paths) == {
        "train": {"train/a.png", "train/x/b.png"},
        "val": {"val/a.png"},
        "test": {"test/a.png"},
    }
    assert len(split_names([*paths, "other/a.png"])["train"]) == 3


def test_twenty_images_are_enough_to_train(tmp_path):
    write_images(tmp_path, 20)
    data = image_folder(tmp_path)
    data.setup()
    assert keys(data.train_dataloader())
    assert keys(data.val_dataloader())
    assert keys(data.test_dataloader())


def with_bad_files(root, kinds, *, split, count=40, **changes):
    """A folder in which as many files of `split` as there are kinds have been spoiled, and their names."""
    write_images(root, count)
    data = image_folder(root, **({"val_fraction": 0.3, "test_fraction": 0.2} | changes))
    data.setup()
    dataset = data.datasets[split]
    bad = [dataset.source.paths[number] for number in dataset.numbers[1 : len(kinds) + 1]]
    for name, kind in zip(bad, kinds, strict=True):
        spoil(root / name, kind)
    return data, bad


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_bad_files_by_good_ones_and_counts_each_once(tmp_path, num_workers, caplog):
    data, bad = with_bad_files(tmp_path, KINDS, split="train", num_workers=num_workers, batch_size=1)
    loader = data.train_dataloader()
    with caplog.at_level(logging.WARNING):
        read = [key for _ in range(2) for batch in keys(loader) for key in batch]
    assert len(read) == 2 * len(data.datasets["train"])
    assert not set(read) & set(bad)
    assert data.datasets["train"].source.num_bad == len(bad)
    if num_workers == 0:  # workers write to their own standard error
        assert sum("skipping an unreadable image" in message for message in caplog.messages) == len(bad)


def test_a_replacement_does_not_depend_on_what_was_read_before(tmp_path):
    data, _ = with_bad_files(tmp_path, ["text", "empty"], split="train")
    dataset = data.datasets["train"]
    first = dataset[0, 1]
    assert first["key"] == dataset[0, 3]["key"]
    for number in range(len(dataset)):
        dataset[0, number]
    assert torch.equal(first["image"], dataset[0, 1]["image"])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_leaves_bad_files_out(tmp_path, batch_size):
    data, bad = with_bad_files(tmp_path, ["text", "empty"], split="val", eval_batch_size=batch_size)
    read = [key for batch in keys(data.val_dataloader()) for key in batch]
    expected = [data.datasets["val"].source.paths[number] for number in data.datasets["val"].numbers]
    assert read == [key for key in expected if key not in bad]


def test_too_many_bad_files_stop_the_run(tmp_path):
    data, _ = with_bad_files(tmp_path, KINDS, split="train", max_bad_fraction=0.1, batch_size=1)
    with pytest.raises(ValueError, match=r"5 of the 40 images in data.root=.*data.max_bad_fraction=0.1"):
        list(data.train_dataloader())


def test_without_tolerance_the_first_bad_file_stops_the_run(tmp_path):
    data, _ = with_bad_files(tmp_path, ["text"], split="train", max_bad_fraction=0.0, batch_size=1)
    with pytest.raises(ValueError, match="1 of the 40 images"):
        list(data.train_dataloader())


def test_flips_change_with_the_epoch_and_can_be_turned_off(tmp_path):
    write_images(tmp_path, 24)
    flipping, plain = (image_folder(tmp_path, flip=flip).make_datasets()["train"] for flip in (True, False))
    upright = torch.stack([plain[0, number]["image"] for number in range(len(plain))])
    flipped = []
    for epoch in range(2):
        images = torch.stack([flipping[epoch, number]["image"] for number in range(len(plain))])
        flipped.append([torch.equal(image, other.flip(-1)) for image, other in zip(images, upright, strict=True)])
    assert 0 < sum(flipped[0]) < len(plain)
    assert flipped[0] != flipped[1]
