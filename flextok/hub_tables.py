"""Tables of Hugging Face `datasets`, from disk or from the hub."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_FOLDERS = "a folder that save_to_disk wrote, a folder of parquet files or images, or a name on the hub"


def load_tables(path: str, config_name: str | None, *, field: str) -> "DatasetDict | dict[str, Dataset]":
    """The splits of a data set by name; a single table that `save_to_disk` wrote is called `train`.

    Args:
        path: A folder that `save_to_disk` wrote, a folder of files that `datasets` reads, or a name on the hub.
        config_name: Which of several configurations of a data set on the hub.
        field: The setting that `path` comes from, for errors.

    Raises:
        ValueError: There is no such data set, or the hub cannot be reached.
        ImportError: `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the library datasets: pip install 'flextok[hf]'") from error
    folder = Path(path).expanduser()
    try:
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(folder))
            return {"train": saved} if isinstance(saved, datasets.Dataset) else saved
        if folder.is_dir():
            return datasets.load_dataset(str(folder), config_name)
        _check_hub(path, datasets.config.HF_ENDPOINT, offline=datasets.config.HF_HUB_OFFLINE)
        return datasets.load_dataset(path, config_name)
    # Some of its errors are of the kinds below, the rest belongs to the library.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{field}={path!r} cannot be loaded: {error}; valid: {_FOLDERS}") from error


def _check_hub(path: str, endpoint: str, *, offline: bool) -> None:
    """Without this, `datasets` tries again for half a minute where there is no network."""
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError("there is no such folder")
    if offline:
        return
    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=5)
    except HTTPError:
        return
    except OSError as error:
        raise ValueError(
            f"there is no such folder, and {endpoint} cannot be reached ({error}); give a local folder, or set "
            "HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error
