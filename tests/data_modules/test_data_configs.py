"""Every file in configs/data builds its data module."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import MissingMandatoryValue

from flextok.cli import main
from flextok.data.datamodule import ImageDataModule
from tests.data_modules.images import encoded_image, write_images, write_streaming
from tests.support import REPOSITORY

CONFIGS = REPOSITORY / "configs"


def build(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return instantiate(compose(overrides=["+seed=3", f"+data={name}", *overrides]).data)


def with_images(name, folder):
    """The overrides of a data set that needs images of one's own."""
    if name == "image_folder":
        write_images(folder, 40)
        return [f"data.root={folder}", "data.image_size=16"]
    if name == "webdataset":
        write_images(folder / "images", 40)
        main(["prepare", str(folder / "images"), str(folder / "shards"), "--workers", "0"])
        return [f"data.root={folder / 'shards'}", "data.image_size=16"]
    if name == "streaming":
        write_streaming(folder, train=40)
        return [f"data.path={folder}", "data.image_size=16"]
    if name == "hf":
        from datasets import Dataset

        Dataset.from_dict({"image": [encoded_image(n) for n in range(40)]}).save_to_disk(folder)
        return [f"data.path={folder}", "data.image_size=16"]
    return []


@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("data/*.yaml")} - {"latents"}))
def test_every_config_of_images_gives_batches(tmp_path, name):
    data = build(name, "data.num_workers=0", *with_images(name, tmp_path))
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["key"]) == data.batch_size
    assert next(iter(data.val_dataloader()))["image"].shape[-1] == data.image_size


def test_the_folder_must_be_given():
    with pytest.raises(MissingMandatoryValue, match="root"):
        build("image_folder")
    for name in ("hf", "streaming"):
        with pytest.raises(MissingMandatoryValue, match="path"):
            build(name)
