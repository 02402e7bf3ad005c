"""Latents that `flextok latents` computed in advance: training without running the VAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.latent_shards import LATENTS, ShardedLatents
from flextok.data.samples import ImageDataset, collate_latents
from flextok.data.shard_index import check_complete, check_shard_content, read_index

# Those of `latent` that say where a VAE is or how it was sampled, not in which space its latents are.
_OTHER_SETTINGS = ("path", "sample_posterior")


class LatentsDataModule(ImageDataModule):
    """Batches `{"latents": [batch, c, h, w], "key": list[str]}` in float32, of the splits that were encoded.

    Training and validation only: evaluation compares images, which are not here.

    Args:
        root: The folder.
        latent: The settings of the model's latent space (the config's `latent`), to be compared with those the
            folder was made with; `None` compares nothing.
        verify: Whether all checksums are compared before training; reads every file.
        **common: The arguments of `ImageDataModule`; `image_size` is that of the images behind the latents.

    Raises:
        ValueError: In `setup`, if the folder holds no latents, or not all, or not those of this model; while reading,
            if a shard is damaged.
    """

    def __init__(
        self, *, root: str | Path, latent: Mapping[str, Any] | None, verify: bool, **common: int | None
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.root = Path(root).expanduser()
        self.latent = None if latent is None else dict(latent)
        self.verify = verify

    def setup(self, stage: str | None = None) -> None:
        """Open the folder.

        Raises:
            ValueError: As said for the class, and where images are asked for.
        """
        # Only `eval.py` does so without a trainer, and it compares images.
        if stage in ("validate", "test") and self.trainer is None:
            raise ValueError(
                f"data.root={str(self.root)!r} holds latents, and evaluation compares images; choose the images they "
                "were made of, such as data=image_folder data.root=<folder>"
            )
        super().setup(stage)

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Check index and sizes of all files; nothing is read yet, unless `verify` asks for it."""
        index = read_index(self.root, LATENTS)
        self._check_settings(index)
        datasets: dict[Split, ImageDataset] = {}
        for name in ("train", "val", "test"):
            split = index["splits"].get(name)
            if split is None:
                if name == "test":
                    continue
                raise ValueError(f"data.root={str(self.root)!r} has no split {name}; add it: flextok latents --splits")
            check_complete(split, name, self.root, LATENTS)
            datasets[name] = ShardedLatents(self.root, split["shards"], num_variants=split["variants"], seed=self.seed)
            for shard in split["shards"] if self.verify else ():
                check_shard_content(self.root, shard, LATENTS)
        return datasets

    def _check_settings(self, index: Mapping[str, Any]) -> None:
        made = index["settings"]
        size = made["data"].get("image_size")
        if size != self.image_size:
            _refuse("data.image_size", self.image_size, self.root, size)
        if self.latent is None:
            return
        ours, theirs = self.latent, made["latent"]
        for name in sorted((ours.keys() | theirs.keys()) - set(_OTHER_SETTINGS)):
            if ours.get(name) != theirs.get(name):
                _refuse(f"latent.{name}", ours.get(name), self.root, theirs.get(name))
        shape, side = index.get("shape"), self.image_size // ours.get("downsample", 1)
        if shape is not None and list(shape) != [ours.get("channels"), side, side]:
            raise ValueError(
                f"data.root={str(self.root)!r} holds latents of shape {list(shape)}, but latent.channels="
                f"{ours.get('channels')} and latent.downsample={ours.get('downsample')} promise "
                f"{[ours.get('channels'), side, side]}; make the latents again with the settings of their VAE"
            )

    def _common_arguments(self) -> dict[str, Any]:
        return {**super()._common_arguments(), "collate_fn": collate_latents}


def _refuse(field: str, value: Any, root: Path, valid: Any) -> None:
    raise ValueError(
        f"{field}={value!r} does not fit data.root={str(root)!r}; valid: {valid!r}, with which these latents were "
        "made (and the vae group they were made with)"
    )
