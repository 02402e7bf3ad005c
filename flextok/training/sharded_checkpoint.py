"""Checkpoints as folders: each process writes its part of every sharded tensor, any number of them reads it back.

    last.ckpt/
      __<rank>_<n>.distcp, .metadata    the parts and their index, written by torch.distributed.checkpoint
      meta.pt                           what is not sharded, the shapes of what is, and the sums of the other files

Nothing is unpickled but tensors, plain types, and the classes that index the parts.
"""

import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable
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

from flextok.training.distributed import by_rank_zero, of_all_ranks

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
    """Whether it is a folder that `write_sharded` has completed."""
    return (path / META).is_file()


def write_sharded(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint into a new or empty folder, and wait until the disk has it; all processes call it.

    Each writes what it has of the sharded tensors; everything else is as rank 0 has it.

    Raises:
        OSError: the system refused one of them, such as for a full disk. It is raised on all of them.
    """
    parts: dict[str, Tensor] = {}
    rest = _map_tensors(checkpoint, lambda key, tensor: _take_out(key, tensor, parts))
    try:
        dcp.save(parts, checkpoint_id=folder)
    except CheckpointException as error:  # No Exception, on all ranks the same.
        raise next(iter(error.failures.values()))[0] from error
    files = folder.glob(f"__{dist.get_rank()}_*")
    sums = of_all_ranks({file.name: _checksum(file) for file in files})
    by_rank_zero(lambda: _write_meta(folder, sums, rest))


def _write_meta(folder: Path, sums: list[dict[str, int]], rest: Any) -> None:
    checksums = {file: checksum for of_rank in sums for file, checksum in of_rank.items()}
    checksums[_INDEX] = _checksum(folder / _INDEX)
    with (folder / META).open("wb") as stream:
        torch.save({"checksums": checksums, "checkpoint": rest}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def read_file(file: Path) -> Any:
    """What `torch.save` wrote, on the CPU; its tensors stay on disk until they are used.

    Raises:
        zipfile.BadZipFile: it is damaged. Other damage raises what `torch.load` raises.
    """
    # Loading checks no sums: flipped bits would become weights.
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def read_sharded(folder: Path, *, values: bool = True, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The checkpoint in a folder, whole and on the CPU; with a mesh, of each sharded tensor what this process is due.

    It does not matter how many processes wrote it, and they need not read it together. Without `values` the sharded
    tensors are on the meta device: a shape alone.

    Raises:
        ValueError: parts are missing or damaged. Damage to `meta.pt` itself raises what `read_file` raises.
    """
    meta = read_file(folder / META)
    if not isinstance(meta, dict) or meta.keys() != {"checksums", "checkpoint"}:
        raise ValueError(f"{META} is none of a checkpoint")
    checkpoint, checksums = meta["checkpoint"], meta["checksums"]
    bad = [name for name in checksums if not (folder / name).is_file() or _checksum(folder / name) != checksums[name]]
    if bad:
        raise ValueError(f"missing or with a wrong checksum: {', '.join(bad)}")
    shapes: dict[str, Tensor] = {}
    _map_tensors(checkpoint, lambda key, tensor: _take_out(key, tensor, shapes))
    size = sum((folder / name).stat().st_size for name in checksums)
    if sum(tensor.nbytes for tensor in shapes.values()) > size:
        raise ValueError(f"its tensors are said to be larger than the {size:,} bytes of its files")
    if not values:
        return checkpoint
    parts = {key: _empty(tensor, mesh) for key, tensor in shapes.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(parts, storage_reader=_Reader(folder), no_dist=True)
    except CheckpointException as error:  # No Exception, and a traceback is its text.
        raise ValueError(f"its parts do not fit together: {str(error).strip().splitlines()[-1]}") from error
    return _map_tensors(checkpoint, lambda key, tensor: parts.get(key, tensor))


class _Reader(dcp.FileSystemReader):
    """Torch's reader, but the index can name nothing but what an index consists of, and only tensors in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / _INDEX).open("rb") as file:
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
