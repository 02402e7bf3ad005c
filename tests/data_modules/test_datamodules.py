"""What all data modules promise, and the splits of the embedded data."""

import pytest
import torch
from PIL import Image

from flextok.data import photos as photos_module
from flextok.data.photos import load_photo, split_photo
from tests.data_modules.images import digits, image_folder, keys, photos, write_images


@pytest.fixture(params=["digits", "photos", "image_folder"])
def make(request, tmp_path):
    if request.param == "image_folder":
        write_images(tmp_path, 24)
        return lambda **changes: image_folder(tmp_path, **changes)
    return {"digits": digits, "photos": photos}[request.param]


def ready(data, stage=None):
    data.setup(stage)
    return data


def all_images(loader):
    return torch.cat([batch["image"] for batch in loader])


def test_batches_have_the_promised_shape_and_range(make):
    data = ready(make(batch_size=5, eval_batch_size=3, image_size=16))
    for loader, size in ((data.train_dataloader(), 5), (data.val_dataloader(), 3), (data.test_dataloader(), 3)):
        batch = next(iter(loader))
        images = batch["image"]
        assert images.shape[0] == len(batch["key"]) <= size
        assert (images.shape[1:], images.dtype) == ((3, 16, 16), torch.float32)
        assert -1 <= images.min() < images.max() <= 1
        assert len(set(batch["key"])) == len(batch["key"])


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(make):
    first, same, other = (ready(make(seed=seed)).train_dataloader() for seed in (0, 0, 1))
    reference = all_images(first)
    assert torch.equal(reference, all_images(same))
    assert not torch.equal(reference, all_images(other))


def test_evaluation_does_not_depend_on_seed_or_batch_size(make):
    first = ready(make(seed=0, eval_batch_size=1))
    second = ready(make(seed=1, eval_batch_size=7))
    for split in ("val_dataloader", "test_dataloader"):
        assert sum(keys(getattr(first, split)()), []) == sum(keys(getattr(second, split)()), [])
        assert torch.equal(all_images(getattr(first, split)()), all_images(getattr(second, split)()))


def test_splits_share_no_image(make):
    data = ready(make(batch_size=1))
    of_split = [
        {key for batch in keys(loader) for key in batch}
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert all(of_split)
    assert len(set.union(*of_split)) == sum(map(len, of_split))


def test_a_batch_larger_than_the_train_set_is_refused_for_training_only(make):
    data = make(batch_size=100_000)
    with pytest.raises(ValueError, match=r"data.batch_size is 100000.*between 1 and \d+"):
        data.setup("fit")
    ready(make(batch_size=100_000, eval_batch_size=2), "test")


@pytest.mark.parametrize("field", ["image_size", "batch_size", "eval_batch_size"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=f"data.{field} is 0"):
        digits(**{field: 0})


def test_digits_are_split_as_announced():
    data = ready(digits())
    assert {split: len(dataset) for split, dataset in data.datasets.items()} == {"train": 1285, "val": 256, "test": 256}
    numbers = {int(key.split("/")[1]) for dataset in data.datasets.values() for key in dataset.keys}
    assert numbers == set(range(1797))
    # The benchmark: a change of these makes earlier results incomparable.
    assert data.datasets["val"].keys[:3] == ["digits/0006", "digits/0020", "digits/0029"]
    assert data.datasets["test"].keys[:3] == ["digits/0005", "digits/0007", "digits/0012"]


def test_digits_have_three_equal_channels_and_all_their_grey_levels():
    images = all_images(ready(digits()).test_dataloader())
    assert torch.equal(images[:, 0], images[:, 2])
    assert torch.equal(images.unique(), torch.arange(17) / 8 - 1)


def test_digits_refuse_sizes_that_are_no_multiple_of_eight():
    with pytest.raises(ValueError, match="data.image_size is 12.*multiple of 8"):
        digits(image_size=12).setup()


def test_the_parts_of_a_photograph_cover_it_once():
    numbered = Image.new("I", (41, 31))
    numbered.putdata(range(41 * 31))
    pixels = [pixel for part in split_photo(numbered).values() for pixel in part.get_flattened_data()]
    assert sorted(pixels) == list(range(41 * 31))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_crops_see_no_pixel_of_another_part(monkeypatch, split):
    def crops():
        dataset = photos(names=["chelsea"]).make_datasets()[split]
        return torch.stack([dataset[epoch, number]["image"] for epoch in range(20) for number in range(10)])

    def paint_the_others(name):
        photo = load_photo(name)
        width, height = photo.size
        edge = round(0.75 * width)
        boxes = {
            "train": (0, 0, edge, height),
            "val": (edge, 0, width, height // 2),
            "test": (edge, height // 2, width, height),
        }
        painted = Image.new("RGB", photo.size, "magenta")
        painted.paste(photo.crop(boxes[split]), boxes[split][:2])
        return painted

    before = crops()
    monkeypatch.setattr(photos_module, "load_photo", paint_the_others)
    assert torch.equal(before, crops())


def test_crops_reach_the_borders_of_their_part():
    dataset = photos(names=["chelsea"], min_crop=100).make_datasets()["train"]
    width, height = dataset.photos[0][1].size
    corners = [
        tuple(map(int, dataset[0, n]["key"].split("/")[-1].removesuffix("_flipped").split("_"))) for n in range(2000)
    ]
    assert {x for x, _, _ in corners} == set(range(width - 99))
    assert {y for _, y, _ in corners} == set(range(height - 99))
    assert {side for *_, side in corners} == {100}


def test_about_half_of_the_training_crops_are_flipped_and_no_other():
    datasets = photos().make_datasets()
    flipped = [datasets["train"][0, number]["key"].endswith("_flipped") for number in range(400)]
    assert 150 < sum(flipped) < 250
    assert not any(datasets["val"][number]["key"].endswith("_flipped") for number in range(10))


@pytest.mark.parametrize("name", ["hubble_deep_field", "retina", "ihc", "brick", "camera", "coins", "moon", "flower"])
def test_every_named_photograph_is_there(name):
    assert load_photo(name).mode == "RGB"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ["lena"]}, "data.names has 'lena': choose from astronaut"),
        ({"names": []}, "data.names is empty"),
        ({"max_crop": 4000}, "16 and 4000: chelsea allows"),
        ({"min_crop": 101}, "101 and 100: chelsea allows"),
        ({"num_eval_crops": 0}, "data.num_eval_crops is 0"),
    ],
)
def test_impossible_crops_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        photos(**changes).setup()


def test_missing_packages_and_files_are_named(monkeypatch):
    monkeypatch.setitem(photos_module._FILES, "gone", ("skimage", "gone.png"))
    with pytest.raises(FileNotFoundError, match="leave it out of data.names"):
        load_photo("gone")
    monkeypatch.setattr(photos_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"flextok\[data\]"):
        load_photo("chelsea")
