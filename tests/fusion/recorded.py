"""The recorded model, prompts and outputs of fused generation and of ensembles; see tests/data/paraphrase/README.md."""

import json
from functools import lru_cache
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from flextok.fusion import PackedPrompt, pack_segments
from tests.support import REPOSITORY

FOLDER = REPOSITORY / "tests" / "data" / "paraphrase"


def recorded_model(attention: str = "sdpa") -> LlamaForCausalLM:
    with safe_open(FOLDER / "model_gqa4x2.safetensors", "pt") as file:
        config = LlamaConfig(**json.loads(file.metadata()["config"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    model.load_state_dict(weights)
    return model


@lru_cache
def cases_of(stem: str) -> list[dict[str, Any]]:
    with safe_open(FOLDER / f"{stem}.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"])


@lru_cache
def tensors_of(stem: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{stem}.safetensors")


def packed(case: dict[str, Any]) -> PackedPrompt:
    return pack_segments(
        case["segments"],
        prefix=case["prefix"],
        separator=case["separator"],
        tail=case["tail"],
        positions=case["positions"],
    )


def random_ids(*lengths: int, seed: int = 0, vocabulary: int = 128) -> list[list[int]]:
    """Lists of token ids, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
