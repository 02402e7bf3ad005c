"""The images that `flextok prepare` and `flextok tokenize` read: files of a folder, or members of tar shards."""

import tarfile
from glob import glob
from pathlib import Path
from typing import NamedTuple, Protocol

from flextok.data.image_files import SUFFIXES, find_images
from flextok.data.tar_shards import StrictTarInfo


class ImageSource(Protocol):
    """Images by number; their keys are unique and name them on every machine."""

    keys: list[str]

    def read(self, number: int) -> bytes:
        """The bytes of an image, as they are stored.

        Raises:
            OSError: They cannot be read.
        """
        ...


class ImageFolder:
    """The image files below a folder, at any depth."""

    def __init__(self, root: Path, keys: list[str]) -> None:
        self.root = root
        self.keys = keys

    def read(self, number: int) -> bytes:
        """The content of a file."""
        return (self.root / self.keys[number]).read_bytes()


class _Place(NamedTuple):
    archive: Path
    offset: int
    size: int


class ImageTars:
    """The image files in uncompressed tar files; a key is the path of a tar file and the name in it.

    Args:
        archives: Paths by the name that the keys begin with.

    Raises:
        ValueError: A tar file is damaged, holds a name twice, or all of them hold no image.
    """

    def __init__(self, archives: dict[str, Path]) -> None:
        places: dict[str, _Place] = {}
        for name, path in archives.items():
            for member, place in _list_images(path):
                key = f"{name}/{member}"
                if key in places:
                    raise ValueError(f"SOURCE: {path} holds {member} twice; valid: names that differ")
                places[key] = place
        if not places:
            raise ValueError(f"SOURCE: no image in {len(archives)} tar files; looked for {', '.join(SUFFIXES)}")
        self.keys = list(places)
        self._places = list(places.values())

    def read(self, number: int) -> bytes:
        """The content of a member; nothing before it is read."""
        archive, offset, size = self._places[number]
        with archive.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def open_source(text: str) -> ImageSource:
    """The images in a folder of images, a folder of `.tar` files, or the `.tar` files that a glob pattern names.

    Raises:
        ValueError: There are none, a folder holds both, or a tar file cannot be read.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        images = find_images(path)
        archives = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*.tar"))}
        if images and archives:
            raise ValueError(f"SOURCE: {path} holds images and tar files; valid: a folder with one of the two")
        if images:
            return ImageFolder(path, images)
    else:
        files = [Path(name) for name in sorted(glob(str(path))) if name.endswith(".tar")]
        archives = {file.name: file for file in files}
        if len(archives) < len(files):
            raise ValueError(f"SOURCE: {text} names tar files of one name in several folders; valid: a single folder")
    if not archives:
        raise ValueError(
            f"SOURCE: {text} has no image; valid: a folder of {', '.join(SUFFIXES)} files, at any depth, or of .tar "
            "files, or a pattern such as 'shards/*.tar'"
        )
    return ImageTars(archives)


def _list_images(path: Path) -> list[tuple[str, _Place]]:
    """Names and places of the images of a tar file; reads the headers alone."""
    found = []
    try:
        with tarfile.open(path, "r:", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and name.lower().endswith(SUFFIXES) and name.rpartition("/")[2][0] != ".":
                    found.append((name, _Place(path, member.offset_data, member.size)))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"SOURCE: {path} is no complete, uncompressed tar file: {error}") from error
    return found
