"""Samples of tar shards: files that follow each other and have one name, up to the first dot, are one sample."""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple, Self
from urllib.parse import unquote

from flextok.data.image_files import SUFFIXES
from flextok.data.shard_index import ShardKind

IMAGES = ShardKind(
    format="flextok images 1",
    content="image shards",
    command="flextok prepare",
    otherwise="for image files choose data=image_folder",
)
_CHUNK = 2**16


class RawSample(NamedTuple):
    """A sample that nobody has decoded yet.

    Attributes:
        key: The name of the sample, unique in its shard.
        image: The bytes of its first image file, or `None` if it has none.
    """

    key: str
    image: bytes | None


class StrictTarInfo(tarfile.TarInfo):
    """Stops where a header is damaged or missing, where `tarfile` takes either for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no end-of-archive mark, but {error} at byte {tarfile_.offset}") from error


def read_shard(url: str) -> Iterator[RawSample]:
    """All samples of a shard in their order, from a path or whatever URL the webdataset library opens.

    Raises:
        ValueError: The shard is missing, damaged or cut off.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys

    is_complete = False
    try:
        stream = gopen(url)
        try:
            for sample in group_by_keys(_files(stream, url)):
                yield RawSample(sample["__key__"], _first_image(sample))
            while stream.read(_CHUNK):  # A command that cannot write all of it would call that an error.
                pass
            is_complete = True
        finally:
            # A command behind a URL that has failed says so when it is closed; one that was stopped may be ignored.
            with nullcontext() if is_complete else suppress(OSError):
                stream.close()
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"the shard {url} cannot be read, or is damaged: {error}") from error


def member_name(key: str, suffix: str) -> str:
    """The name in a shard of the image `key`; what follows the first dot is the suffix, and no two keys share a name.

    `cats/a.b.png` becomes `cats/a%2Eb%2Epng.png`.
    """
    name = key.replace("%", "%25").replace(".", "%2E")
    # The library takes names in underscores for metadata and passes over them.
    return f"{'%5F' + name[1:] if name.startswith('_') else name}{suffix}"


def key_of(name: str) -> str:
    """The key of a sample that `member_name` named, without the suffix."""
    return unquote(name, errors="surrogateescape")


def _files(stream: Any, url: str) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo) as archive:
        for member in archive:
            # Names with a dot in front are leftovers of editors and file managers.
            if member.isreg() and not member.name.rpartition("/")[2].startswith("."):
                file = archive.extractfile(member)
                assert file is not None
                yield {"fname": member.name, "data": file.read(), "__url__": url}
            archive.members = []  # type: ignore[attr-defined]  # Would hold all names read so far.


def _first_image(sample: dict[str, Any]) -> bytes | None:
    return next((data for name, data in sample.items() if f".{name.rpartition('.')[2]}" in SUFFIXES), None)
