"""Which code and which weights made a number: versions of the packages, revision of this one, a hash of a model."""

import hashlib
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

PACKAGES = (
    *("flextok", "torch", "numpy", "einops", "pillow", "safetensors", "hydra-core", "omegaconf"),
    *("lightning", "torchmetrics", "diffusers", "transformers"),
)


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that can change a number; None for what is not installed."""
    return {name: _version(name) for name in PACKAGES}


def git_revision() -> str | None:
    """The commit of this code, ending in `-dirty` if files changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def weights_sha256(model: "nn.Module") -> str:
    """A hash of all weights and their names, the same for a run and its export: files and paths do not count."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def code_sha256() -> str:
    """Of all files of this package, whether or not they are committed or in a repository."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(package).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
