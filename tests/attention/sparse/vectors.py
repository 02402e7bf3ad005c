"""The recorded cases; `tests/data/sparse/README.md` says what they hold."""

import json
from functools import cache

import torch
from safetensors import safe_open

from flextok.attention.sparse import Mask, ResearchAttention, build_config
from tests.support import REPOSITORY

FOLDER = REPOSITORY / "tests/data/sparse"


@cache
def recorded(file, *kinds):
    """`{name: (case, tensors)}` of the cases of these kinds, of all without any."""
    found = {}
    with safe_open(FOLDER / f"{file}.safetensors", "pt") as content:
        for case in json.loads(content.metadata()["cases"]):
            names = [key for key in content.keys() if key.startswith(f"{case['name']}/")]  # noqa: SIM118
            if not kinds or case["kind"] in kinds:
                found[case["name"]] = case, {key.partition("/")[2]: content.get_tensor(key) for key in names}
    return found


def attention_of(specs):
    return ResearchAttention.create_from_config(build_config(specs))


def call(tensors, case, attention, **kwargs):
    """Mask, output and weights of a recorded case."""
    q, k, v = (tensors[name] for name in "qkv")
    common = (q, k, v, tensors.get("attention_mask"), case["scaling"], 0.0)
    kwargs.setdefault("layer_idx", case.get("layer_idx", 0))
    meta = kwargs.pop("sparse_meta_data", {})
    mask = attention.build_mask(*common, meta, **kwargs)
    return mask, *attention.custom_attention(None, *common, dict(meta), **kwargs)


def dense(mask, dtype=torch.float32):
    return mask.get_dense_mask().to(dtype)


def mask_of(values):
    return Mask.create_mask_from_dense_mask(values.shape, values, torch.float32)
