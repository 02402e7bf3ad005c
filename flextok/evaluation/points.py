"""What was measured at one point of a sweep, as files: each is whole or not there, so a sweep can go on after anything.

A point is `<name>.parquet` with a row per image, and numbers of the whole set in the metadata of its schema, and
`<name>.safetensors` with a few pictures. The table is written last; a search for the shortest prefixes has no pictures.
They lie in a folder whose name stands for all that decides their numbers, so that none is ever mistaken for that of
another model, data set or setting.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flextok.evaluation.grid import Point
from flextok.evaluation.pictures import EXTREMES, Example, PointPictures
from flextok.provenance import code_sha256
from flextok.utils.checkpoint import atomic_path

if TYPE_CHECKING:
    from flextok.evaluation.lengths import Search

logger = logging.getLogger(__name__)

_METADATA = b"flextok"
# Of the protocol: what points differ in, and what says where something is, which does not decide a number. Of the code
# there is a sum, which changes with every file of it, committed or not.
_NOT_IDENTITY = (
    *("keep_ks", "steps", "guidance_scale", "forms", "backends", "budgets", "targets"),
    *("checkpoint", "weights_file", "num_images_requested", "import_references", "git_revision", "metrics"),
)
_NOT_IDENTITY_OF_DATA = ("num_workers", "batch_size", "eval_batch_size")


@dataclass(frozen=True, kw_only=True)
class PointNumbers:
    """Numbers of each image, in the order of keys (NaN where there is none), those of the whole set, and the time.

    Searches have no time.
    """

    per_image: dict[str, list[float]]
    of_sets: dict[str, float | None]
    seconds_per_image: float | None
    attention_backends: list[str]


class PointStore:
    """The points in a folder of one fingerprint, of images with these keys; one process writes."""

    def __init__(self, folder: Path, fingerprint: str, keys: Sequence[str]) -> None:
        self._folder = folder / fingerprint
        self._keys = [text(key) for key in keys]

    def has(self, item: "Point | Search") -> bool:
        """Whether it can be read; one that is damaged is logged."""
        if not self._table(item).exists():
            return False
        try:
            self.numbers(item)
            if isinstance(item, Point):
                self.pictures(item)
        except ValueError as error:
            logger.warning("%s; it is measured again", error)
            return False
        return True

    def save(self, item: "Point | Search", numbers: PointNumbers, pictures: PointPictures | None = None) -> None:
        """Write both files, or the table alone where there are no pictures."""
        import pyarrow as pa
        from pyarrow import parquet

        if pictures is not None:
            self._save_pictures(item, pictures)
        about = {**asdict(numbers), "per_image": None}
        table = pa.table({"key": self._keys, **numbers.per_image})
        with atomic_path(self._table(item)) as temporary:
            parquet.write_table(table.replace_schema_metadata({_METADATA: json.dumps(about)}), temporary)

    def _save_pictures(self, item: "Point | Search", pictures: PointPictures) -> None:
        tensors = {"first": pictures.first}
        for kind, examples in pictures.extremes.items():
            pairs = enumerate(examples)
            tensors |= {f"{kind}_{i}": torch.stack([e.original, e.reconstruction]) for i, e in pairs}
        labels = {kind: json.dumps([(e.psnr, e.key) for e in found]) for kind, found in pictures.extremes.items()}
        with atomic_path(self._pictures(item)) as temporary:
            save_file(tensors, temporary, metadata=labels)

    def numbers(self, item: "Point | Search") -> PointNumbers:
        """Raises ValueError where the file is damaged."""
        import pyarrow as pa
        from pyarrow import parquet

        file = self._table(item)
        try:
            table = parquet.read_table(file)
            about = json.loads((table.schema.metadata or {})[_METADATA])
            columns = table.to_pydict()
            if columns.pop("key") != self._keys:
                raise ValueError("it is of other images")
            return PointNumbers(**{**about, "per_image": columns})
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ValueError(f"{file} is damaged ({error})") from error

    def pictures(self, point: Point) -> PointPictures:
        """Raises ValueError where the file is damaged or missing."""
        file = self._pictures(point)
        try:
            with safe_open(file, "pt") as opened:
                labels = {kind: json.loads(found) for kind, found in opened.metadata().items()}
                tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            extremes = {
                kind: [Example(psnr, key, *tensors[f"{kind}_{i}"]) for i, (psnr, key) in enumerate(labels[kind])]
                for kind in EXTREMES
            }
            return PointPictures(first=tensors["first"], extremes=extremes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{file} is damaged ({error})") from error

    def _table(self, item: "Point | Search") -> Path:
        return self._folder / f"{item.name}.parquet"

    def _pictures(self, item: "Point | Search") -> Path:
        return self._folder / f"{item.name}.safetensors"


def fingerprint(protocol: Mapping[str, Any], **more: Any) -> str:
    """Of all that decides the numbers of a point, but the point: a name for a folder."""
    known = {name: value for name, value in protocol.items() if name not in _NOT_IDENTITY}
    data = {name: value for name, value in protocol["data"].items() if name not in _NOT_IDENTITY_OF_DATA}
    content = json.dumps({**known, **more, "data": data, "code": code_sha256()}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def text(key: str) -> str:
    """A key as tables can hold it: file names need not be UTF-8."""
    return key.encode("utf-8", "backslashreplace").decode()
