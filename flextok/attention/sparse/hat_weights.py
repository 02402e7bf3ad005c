"""Weights of HashAttention: two perceptrons per layer and query head, whose outputs' signs are the bits of a signature.

In memory: `{layer: {"query_matrix": [...], "query_bias": [...], "key_matrix": [...], "key_bias": [...]}}`, each matrix
`(H, d_in, d_out)`, each bias `(H, d_out)`. In a file: safetensors with names such as `0.query_matrix.1`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

HatWeights = dict[int, dict[str, list[Tensor]]]
PARTS = ("query_matrix", "query_bias", "key_matrix", "key_bias")


def load_hat_weights(path: str | Path) -> HatWeights:
    """The weights in a safetensors file.

    Raises:
        ValueError: no such file, no safetensors (such as a pickle), cut short, or other tensors than these weights.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"hat_weight_file={str(path)!r} cannot be read as safetensors ({error}); "
            "convert_hat_checkpoint makes one from a checkpoint"
        ) from error
    found: dict[int, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(\d+)\.(query|key)_(matrix|bias)\.(\d+)", name)
        if match is None:
            raise ValueError(f"hat_weight_file={str(path)!r} holds {name!r}; valid: names such as '0.query_matrix.1'")
        part = f"{match[2]}_{match[3]}"
        found.setdefault(int(match[1]), {}).setdefault(part, {})[int(match[4])] = tensor
    weights = {
        layer: {part: [by_index[i] for i in sorted(by_index)] for part, by_index in parts.items()}
        for layer, parts in found.items()
    }
    for layer, parts in found.items():
        for part, by_index in parts.items():
            if sorted(by_index) != list(range(len(by_index))):
                raise ValueError(f"hat_weight_file={str(path)!r} lacks some of {layer}.{part}: {sorted(by_index)}")
    check_hat_weights("hat_weight_file", weights)
    return weights


def save_hat_weights(weights: HatWeights, path: str | Path) -> None:
    """Write weights to a safetensors file; ValueError if they are not such weights."""
    check_hat_weights("hat_weights", weights)
    tensors = {
        f"{layer}.{part}.{i}": tensor.detach().cpu().contiguous().clone()
        for layer, parts in weights.items()
        for part in PARTS
        for i, tensor in enumerate(parts[part])
    }
    save_file(tensors, path)


def check_hat_weights(name: str, weights: Any) -> None:
    """ValueError unless these are weights in the layout of memory, finite and fitting each other."""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{name}={type(weights).__name__}; valid: a dictionary of layers, one or more")
    for layer, parts in weights.items():
        if type(layer) is not int or not isinstance(parts, Mapping) or set(parts) != set(PARTS):
            given = sorted(parts) if isinstance(parts, Mapping) else parts
            raise ValueError(f"{name}[{layer!r}] holds {given}; valid: an int, and {', '.join(PARTS)}")
        for side in ("query", "key"):
            _check_perceptron(f"{name}[{layer}]", side, parts[f"{side}_matrix"], parts[f"{side}_bias"])


def _check_perceptron(where: str, side: str, matrices: list[Tensor], biases: list[Tensor]) -> None:
    if len(matrices) != len(biases) or not matrices:
        raise ValueError(f"{where}: {len(matrices)} {side}_matrix, {len(biases)} {side}_bias; valid: as many, and some")
    width = None
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        for part, tensor in (("matrix", matrix), ("bias", bias)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError(f"{where}.{side}_{part}.{i} is not a tensor of finite floats")
        if matrix.ndim != 3 or bias.shape != (matrix.shape[0], matrix.shape[2]) or width not in (None, matrix.shape[1]):
            raise ValueError(
                f"{where}.{side}_matrix.{i} has shape {list(matrix.shape)}, {side}_bias.{i} {list(bias.shape)}; valid: "
                f"[heads, {width or 'd_in'}, d_out] and [heads, d_out]"
            )
        width = matrix.shape[2]


def convert_hat_checkpoint(checkpoint: str | Path, path: str | Path) -> None:
    """Write the weights of a training checkpoint of HashAttention to a safetensors file.

    The checkpoint is read with `weights_only=True`: it can hold tensors and no code. Names in it:
    `{layer}.learning_to_hash_transformation_{q|k}.{head}.{2 * i}.{weight|bias}`; a missing bias is zero. One that holds
    the layout of memory is written as it is.

    Raises:
        ValueError: the file is something else.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises its own, pickle's and zip's errors for other files
        raise ValueError(f"checkpoint={str(checkpoint)!r} cannot be read as tensors without code: {error}") from error
    if isinstance(content, Mapping) and content and all(type(key) is int for key in content):
        save_hat_weights(dict(content), path)
        return
    states = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(states, Mapping) or not states:
        raise ValueError(f"checkpoint={str(checkpoint)!r} holds a {type(content).__name__}; valid: a dictionary")
    save_hat_weights(_from_states(states), path)


def _from_states(states: Mapping[str, Tensor]) -> HatWeights:
    """Linear layers of single heads, `(d_out, d_in)`, stacked over heads and transposed."""
    heads: dict[tuple[int, str], dict[int, dict[int, dict[str, Tensor]]]] = {}
    for name, tensor in states.items():
        match = re.fullmatch(r"(\d+)\.learning_to_hash_transformation_([qk])\.(\d+)\.(\d+)\.(weight|bias)", str(name))
        if match is None or int(match[4]) % 2:
            raise ValueError(f"checkpoint holds {name!r}; valid: names such as {_EXAMPLE!r}")
        side = "query" if match[2] == "q" else "key"
        by_head = heads.setdefault((int(match[1]), side), {})
        by_head.setdefault(int(match[4]) // 2, {}).setdefault(int(match[3]), {})[match[5]] = tensor.float()
    weights: HatWeights = {}
    for (layer, side), linears in heads.items():
        parts = weights.setdefault(layer, {})
        stacked = [_stacked(f"{layer}, {side}, {i}", linears.get(i, {})) for i in range(max(linears) + 1)]
        parts[f"{side}_matrix"] = [matrix for matrix, _ in stacked]
        parts[f"{side}_bias"] = [bias for _, bias in stacked]
    return weights


_EXAMPLE = "0.learning_to_hash_transformation_q.0.2.weight"


def _stacked(where: str, by_head: dict[int, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    present = sorted(by_head)
    shapes = {tuple(linear["weight"].shape) if "weight" in linear else None for linear in by_head.values()}
    if not present or present != list(range(len(present))) or None in shapes or len(shapes) != 1:
        raise ValueError(
            f"checkpoint: heads {present} with weights of shapes {shapes} at layer {where}; valid: one for each"
        )
    matrices = [by_head[head]["weight"].T for head in present]
    biases = [by_head[head].get("bias", torch.zeros(matrices[0].shape[1])) for head in present]
    return torch.stack(matrices), torch.stack(biases)
