"""The recorded masks of segments, and what the viewer picks of them; see tests/data/paraphrase/README.md."""

import json
from functools import lru_cache
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.support import REPOSITORY

FILE = REPOSITORY / "tests" / "data" / "paraphrase" / "masks.safetensors"


@lru_cache
def segment_tensors() -> dict[str, Tensor]:
    return load_file(FILE)


def segment_cases() -> list[dict[str, Any]]:
    return _metadata("cases")


def visual_cases() -> list[dict[str, Any]]:
    return _metadata("visual")


def _metadata(name: str) -> list[dict[str, Any]]:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()[name])
