"""Images of a Hugging Face data set, from disk or from the hub."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.data.datamodule import ImageDataModule, Split
from flextok.data.image_source import ImageSource, SquareImages
from flextok.data.samples import ImageDataset
from flextok.data.splits import SPLITS, hash_of_names, split_by_hash
from flextok.data.transforms import Encoded
from flextok.hub_tables import load_tables

if TYPE_CHECKING:
    from datasets import Dataset


class HuggingFaceDataModule(ImageDataModule):
    """The central square of each image, resized to `image_size`.

    The data set is read by row number (its iterable form cannot be resumed exactly where it is shuffled), so order,
    resuming and distribution are those of every other data set.

    Args:
        path: A folder that `save_to_disk` wrote, a folder of parquet files or images, or a name on the hub.
        config_name: Which of several configurations of a data set on the hub.
        image_column: The column of images, of the feature `Image` or with the content of their files.
        key_column: The column of ids, all different; None numbers the rows.
        train_split: The name of the split to train on; so are `val_split` and `test_split` for the others, or None,
            which holds out a part of the train split by a hash of the keys.
        val_fraction: The part of the train split held out for `val` where there is no split for it.
        test_fraction: The same for `test`.
        max_bad_fraction: Part of the images of a split that may be unreadable.
        flip: Whether half of the training images are mirrored, anew in every epoch.
        **common: The arguments of `ImageDataModule`.

    Raises:
        ValueError: In `setup`, if the data set, a split or a column does not exist, the hub cannot be reached, keys are
            not unique or a fraction is impossible; while reading, if too many images are unreadable.
        ImportError: In `setup`, if `datasets` is not installed.
    """

    def __init__(
        self,
        *,
        path: str,
        config_name: str | None,
        image_column: str,
        key_column: str | None,
        train_split: str,
        val_split: str | None,
        test_split: str | None,
        val_fraction: float,
        test_fraction: float,
        max_bad_fraction: float,
        flip: bool,
        **common: int | None,
    ) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.path = path
        self.config_name = config_name
        self.image_column = image_column
        self.key_column = key_column
        self.split_names: dict[Split, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self.fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
        self.max_bad_fraction = max_bad_fraction
        self.flip = flip

    def make_datasets(self) -> dict[Split, ImageDataset]:
        """Open the tables and divide their rows; no image is read yet."""
        tables = load_tables(self.path, self.config_name, field="data.path")
        sources: dict[str, TableImages] = {}
        for split, name in self.split_names.items():
            if name is not None and name not in tables:
                raise ValueError(f"data.{split}_split={name!r} is not in {self.path}; valid: {', '.join(tables)}")
            if name is not None and name not in sources:
                sources[name] = TableImages(
                    tables[name],
                    name,
                    where=f"data.path={self.path}",
                    image_column=self.image_column,
                    key_column=self.key_column,
                    max_bad_fraction=self.max_bad_fraction,
                )
        train = str(self.split_names["train"])
        missing = {split: self.fractions[split] for split in SPLITS if self.split_names[split] is None}
        held_out = split_by_hash(sources[train].keys, missing) if missing else {}
        return {
            split: SquareImages(
                sources[name or train],
                held_out[split] if split in held_out else range(len(sources[name or train])),
                image_size=self.image_size,
                seed=self.seed,
                is_training=split == "train",
                flip=self.flip and split == "train",
            )
            for split, name in self.split_names.items()
        }


class TableImages(ImageSource):
    """The images in the rows of a table; the key of a row is what the key column says, or split and number.

    Raises:
        ValueError: A column does not exist or holds something else, or two keys are equal.
    """

    def __init__(
        self,
        table: "Dataset",
        split: str,
        *,
        where: str,
        image_column: str,
        key_column: str | None,
        max_bad_fraction: float,
    ) -> None:
        from datasets import Image, Value

        super().__init__(len(table), where=where, max_bad_fraction=max_bad_fraction)
        for field, column in (("image_column", image_column), ("key_column", key_column)):
            if column is not None and column not in table.column_names:
                raise ValueError(
                    f"data.{field}={column!r} is not in {where}; valid: one of {', '.join(table.column_names)}"
                )
        self.fingerprint_of_table = str(table._fingerprint)
        self.keys = _keys(table, split, key_column, where)
        feature = table.features[image_column]
        if isinstance(feature, Image):
            # We decode ourselves, so that an unreadable image is counted and not an error of the table.
            table = table.cast_column(image_column, Image(decode=False))
        elif not (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")):
            images = [name for name, kind in table.features.items() if isinstance(kind, Image)]
            raise ValueError(
                f"data.image_column={image_column!r} of {where} holds {feature}; valid: a column of images"
                f"{' such as ' + ', '.join(images) if images else ' or of the content of image files'}"
            )
        self.images = table.select_columns([image_column]).with_format(None)
        self.image_column = image_column

    def fetch(self, number: int) -> tuple[str, Encoded]:
        """The key of a row and its image: bytes, or the path of a file."""
        image = self.images[number][self.image_column]
        if isinstance(image, dict):
            image = image["bytes"] if image["bytes"] is not None else Path(str(image["path"]))
        return self.keys[number], image if image is not None else b""

    def fingerprint(self, numbers: Sequence[int]) -> str:
        """Depends on the table and on which of its rows these are."""
        return hash_of_names([self.fingerprint_of_table, *(self.keys[number] for number in numbers)])


def _keys(table: "Dataset", split: str, key_column: str | None, where: str) -> list[str]:
    if key_column is None:
        return [f"{split}/{row}" for row in range(len(table))]
    values: list[Any] = list(table[key_column])
    keys = [str(value) for value in values]
    if len(set(keys)) < len(keys):
        (key, count), *_ = Counter(keys).most_common(1)
        raise ValueError(
            f"data.key_column={key_column!r} of {where} has {key!r} {count} times; valid: a column of different values"
        )
    return keys
