"""Checkpoints as folders: each process writes its part of every sharded tensor, any number of them reads it back.

    last.ckpt/
      meta.pt       what is not sharded, the shapes of what is, the name of the folder with the parts, and their sums
      <name>/       the parts, written by torch.distributed.checkpoint

`meta.pt` is replaced once the parts of the new checkpoint are complete: whatever is killed leaves the old one or the
new one. Nothing is unpickled but tensors, plain types, and the classes that index the parts.
"""

import pickle
import shutil
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor

from flextok.training.distributed import of_all_ranks
from flextok.utils.checkpoint import atomic_path

META = "meta.pt"
_INDEX = ".metadata"
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "WindowsPath"),
}


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether it is a folder in which `write_sharded` has completed a checkpoint."""
    return (path / META).is_file()


def write_sharded(checkpoint: dict[str, Any], folder: Path) -> None:
    """Make `folder` this checkpoint, in one step; all processes call it.

    Each writes what it has of the sharded tensors; everything else is as rank 0 has it.
    """
    parts: dict[str, Tensor] = {}
    rest = _map_tensors(checkpoint, lambda key, tensor: _take_out(key, tensor, parts))
    name = of_all_ranks(uuid.uuid4().hex)[0]
    is_first = dist.get_rank() == 0
    with make_way(folder) if is_first and folder.is_file() else nullcontext():
        dcp.save(parts, checkpoint_id=folder / name)
        files = sorted((folder / name).glob(f"__{dist.get_rank()}_*"))
        sums = of_all_ranks({file.name: _checksum(file) for file in files})
        if is_first:
            checksums = {file: checksum for of_rank in sums for file, checksum in of_rank.items()}
            checksums[_INDEX] = _checksum(folder / name / _INDEX)
            with atomic_path(folder / META) as path:
                torch.save({"parts": name, "checksums": checksums, "checkpoint": rest}, path)
            for older in folder.iterdir():
                if older.is_dir() and older.name != name:
                    shutil.rmtree(older)
    dist.barrier()


@contextmanager
def make_way(path: Path) -> Iterator[None]:
    """Keep a checkpoint of the other kind, file or folder, beside the one of its name that the block writes.

    It is removed when the block has succeeded; otherwise it stays, as `replaced_<name>`, for whoever looks for another.
    """
    aside = path.with_name(f"replaced_{path.name}")
    if path.is_file() or is_sharded_checkpoint(path):
        _remove(aside)
        path.replace(aside)
    else:
        _remove(path)  # Never completed.
    yield
    _remove(aside)


def read_header(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, whose sharded tensors are on the meta device: a shape without values."""
    return _read_meta(folder)["checkpoint"]


def read_sharded(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The checkpoint in a folder, whole and on the CPU; with a mesh, of each sharded tensor what this process is due.

    It does not matter how many processes wrote it, and they need not read it together.

    Raises:
        ValueError: parts are missing or damaged. Damage to `meta.pt` itself raises what `torch.load` raises.
    """
    meta = _read_meta(folder)
    place, checksums = folder / meta["parts"], meta["checksums"]
    bad = [name for name in checksums if not (place / name).is_file() or _checksum(place / name) != checksums[name]]
    if bad:
        raise ValueError(f"missing or with a wrong checksum: {', '.join(bad)}")
    shapes: dict[str, Tensor] = {}
    _map_tensors(meta["checkpoint"], lambda key, tensor: _take_out(key, tensor, shapes))
    num_bytes = sum((place / name).stat().st_size for name in checksums)
    if sum(tensor.nbytes for tensor in shapes.values()) > num_bytes:
        raise ValueError(f"its tensors are said to be larger than the {num_bytes:,} bytes of its files")
    reader = _Reader(place)
    values = {key: _empty(tensor, mesh) for key, tensor in shapes.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(values, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # No Exception, and a traceback is its text.
        raise ValueError(f"its parts do not fit together: {str(error).strip().splitlines()[-1]}") from error
    return _map_tensors(meta["checkpoint"], lambda key, tensor: values.get(key, tensor))


class _Reader(dcp.FileSystemReader):
    """Torch's reader, but the index can name nothing but what an index consists of, and only tensors in it."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        with (place / _INDEX).open("rb") as file:
            self._index: Metadata = _IndexUnpickler(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX_CLASSES.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{_INDEX} names {module}.{name}, which no index needs")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _read_meta(folder: Path) -> dict[str, Any]:
    meta = torch.load(folder / META, map_location="cpu", weights_only=True)
    if not isinstance(meta, dict) or not {"parts", "checksums", "checkpoint"} <= meta.keys():
        raise ValueError(f"{META} is none of a checkpoint")
    return meta


def _map_tensors(node: Any, function: Callable[[str, Tensor], Any], key: str = "") -> Any:
    """A copy of nested containers in which each tensor is what `function` makes of its place and itself."""
    if isinstance(node, Tensor):
        return function(key, node)
    if isinstance(node, dict):
        return {name: _map_tensors(child, function, f"{key}/{name}") for name, child in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_map_tensors(child, function, f"{key}/{index}") for index, child in enumerate(node))
    return node


def _take_out(key: str, tensor: Tensor, into: dict[str, Tensor]) -> Tensor:
    """Note a tensor that is sharded, or the shape of one, and return its shape; other tensors as they are."""
    if isinstance(tensor, DTensor) or tensor.is_meta:
        into[key] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor


def _empty(shape: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty(shape.shape, dtype=shape.dtype)
    return empty_dtensor(shape.shape, dtype=shape.dtype, device_mesh=mesh, placements=[Shard(0)])


def _checksum(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
