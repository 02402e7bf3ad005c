"""Every file in configs/data builds its data module."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import MissingMandatoryValue

from flextok.cli import main
from flextok.data.datamodule import ImageDataModule
from tests.data_modules.images import write_images
from tests.support import REPOSITORY

CONFIGS = REPOSITORY / "configs"


def build(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return instantiate(compose(overrides=["+seed=3", f"+data={name}", *overrides]).data)


@pytest.mark.parametrize("name", sorted({path.stem for path in CONFIGS.glob("data/*.yaml")} - {"latents"}))
def test_every_config_of_images_gives_batches(tmp_path, name):
    write_images(tmp_path / "images", 40)
    main(["prepare", str(tmp_path / "images"), str(tmp_path / "shards"), "--workers", "0"])
    roots = {"image_folder": tmp_path / "images", "webdataset": tmp_path / "shards"}
    overrides = [f"data.root={roots[name]}", "data.image_size=16"] if name in roots else []
    data = build(name, "data.num_workers=0", *overrides)
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["key"]) == data.batch_size
    assert next(iter(data.val_dataloader()))["image"].shape[-1] == data.image_size


def test_the_folder_must_be_given():
    with pytest.raises(MissingMandatoryValue, match="root"):
        build("image_folder")
