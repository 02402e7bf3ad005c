"""What several tests need: recorded outputs of the published inference code, comparisons, tiny models."""

import json
import os
import subprocess
import sys
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).resolve().parent / "data" / "flextok"


# The config of a small module that takes nothing but numbers and keys.
LINEAR = {
    "_target_": "flextok.model.preprocessors.linear.LinearLayer",
    "read_key": "x",
    "write_key": "y",
    "dim_in": 2,
    "dim": 3,
}


def python(*arguments: object, threads: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """What `python <arguments>` does in the repository: its output, and its exit status in `returncode`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout)


def python_output(*arguments: object, **options: Any) -> str:
    """What a command that must succeed writes to its output."""
    done = python(*arguments, **options)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@lru_cache
def recorded_cases(stem: str) -> list[dict[str, Any]]:
    with safe_open(RECORDED / f"{stem}.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"])


@lru_cache
def _tensors_by_case(stem: str) -> dict[str, dict[str, Tensor]]:
    by_case: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(RECORDED / f"{stem}.safetensors").items():
        case, rest = name.split("//", 1)
        by_case.setdefault(case, {})[rest] = tensor
    return by_case


def recorded_tensors(stem: str, case: str, part: str) -> dict[str, Tensor]:
    """Fresh copies of one `part` (`in`, `state` or `out`) of a case."""
    tensors = _tensors_by_case(stem).get(case, {})
    return {name[len(part) + 1 :]: t.clone() for name, t in tensors.items() if name.startswith(f"{part}/")}


def recorded_inputs(stem: str, case: dict[str, Any]) -> dict[str, Any]:
    """Inputs as the modules want them: lists of `[1, ...]` tensors, or a bare tensor (null)."""
    tensors = recorded_tensors(stem, case["name"], "in")
    return {
        key: tensors[key] if count is None else [tensors[f"{key}.{i}"] for i in range(count)]
        for key, count in case["inputs"].items()
    }


@lru_cache
def recorded_model(checkpoint: str) -> nn.Module:
    """Shared between tests: leave its weights alone. Needs the recorded folder as working directory."""
    from flextok.utils.checkpoint import load_model_from_safetensors

    return load_model_from_safetensors(str(RECORDED / checkpoint))


def assert_close(actual: Any, expected: Tensor, tol: float = 1e-4, what: str = "result") -> None:
    """Same shape and values; integers and booleans equal, dtypes too wherever `actual` has one."""
    if isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    actual = torch.as_tensor(actual).detach()
    assert actual.shape == expected.shape, f"{what}: {list(actual.shape)}, expected {list(expected.shape)}"
    if not expected.is_floating_point():
        differing = int((actual != expected).sum())
        assert differing == 0, f"{what}: {differing} of {expected.numel()} entries differ"
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    difference = float((actual.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    assert difference < tol, f"{what}: max abs difference {difference:.3g}, allowed {tol:.3g}"


def max_difference(left: Tensor, right: Tensor) -> float:
    assert left.shape == right.shape, f"shapes {list(left.shape)} and {list(right.shape)}"
    left, right = left.detach(), right.detach()
    return float((left.double() - right.double()).abs().max()) if left.numel() else 0.0


class Untouched:
    """Remembers tensors and the lists that hold them; `check` says whether any of them was written into."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.containers = [(key, value, list(value)) for key, value in data.items() if isinstance(value, list | tuple)]
        self.tensors = [(name, tensor, tensor.detach().clone()) for name, tensor in _named_tensors(data)]

    def check(self) -> None:
        for key, container, entries in self.containers:
            assert list(map(id, container)) == list(map(id, entries)), f"the list under {key!r} was changed"
        for name, tensor, before in self.tensors:
            assert torch.equal(tensor, before), f"the tensor given as {name!r} was changed"


def _named_tensors(data: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in data.items():
        entries = value if isinstance(value, list | tuple) else [value]
        yield from ((f"{key}.{i}", t) for i, t in enumerate(entries) if isinstance(t, Tensor))


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: zero-initialised heads and modulations would make tests pass trivially."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            std = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def tiny_decoder(*, mask_mode: str = "full", drop_masked: bool = False) -> nn.Module:
    """The decoder of the recorded attention-masked checkpoint with another mask and weights, in eval mode.

    16 registers of `enc_registers_quant` (6 channels), latents of at most 4x8x8, patches of 2x2. Writes
    `vae_latents_reconst` and, unpacked to full length, `dec_registers_proj`.
    """
    from hydra.utils import instantiate

    with safe_open(RECORDED / "tiny_attn_masked.safetensors", "pt") as file:
        config = literal_eval(file.metadata()["decoder"])
    packer = config["module_dict"]["dec_seq_packer"]
    packer["mask_mode"] = mask_mode
    if drop_masked:  # files written before this setting existed lack it
        packer["drop_masked"] = True
    decoder = randomize(instantiate(config)).eval()
    # Evaluation would leave hidden tokens out; here the mask has to hide them.
    decoder.module_dict["dec_seq_packer"].shortens_rows = drop_masked
    return decoder


FORMS = ("mask_token", "attention_mask", "packed")


def small_tokenizer(form: str, *overrides: str) -> Any:
    """A FlexTok on latents `[1, 3, h, w]` up to 8x8, one patch each, 16 registers, 1 + 2 layers, random weights.

    `form` is a choice of the config group `dropout`. Given `vae_latents`, it leaves images alone.
    """
    return deepcopy(_built_tokenizer(form, overrides))


@lru_cache
def _built_tokenizer(form: str, overrides: tuple[str, ...]) -> nn.Module:
    from hydra.utils import instantiate

    from flextok.config import compose

    sizes = {"encoder_depth": 1, "decoder_depth": 2, "encoder_width": 32, "decoder_width": 32, "head_dim": 16}
    sizes |= {"registers": 16, "patch": 1, "intermediate_layer": 0}
    given = [f"size.{name}={value}" for name, value in sizes.items()]
    config = compose(["data=digits", "+model.vae.force_vae_encode=false", f"dropout={form}", *given, *overrides])
    return randomize(instantiate(config.model, _convert_="all"))


@contextmanager
def tokens_processed(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Yield the row lengths that the blocks of each trunk inside `model` get, one entry per pass of the trunk.

    All blocks of a pass must agree. Trunks are named by the last part of their module's name.
    """
    from flextok.model.trunks.transformers import FlexTransformer

    lengths: dict[str, list[int]] = {}
    handles = []
    for name, trunk in model.named_modules():
        if isinstance(trunk, FlexTransformer):
            seen = lengths.setdefault(name.rpartition(".")[2], [])
            handles += [
                block.register_forward_pre_hook(partial(_note_length, seen, index == 0))
                for index, block in enumerate(trunk.blocks)
            ]
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()


def _note_length(seen: list[int], is_first: bool, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if is_first:
        seen.append(inputs[0].shape[1])
    assert seen[-1] == inputs[0].shape[1]


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


class Interruptions:
    """Raises `Killed` after so many calls of any of the functions it may strike."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.calls_left = 0

    def may_strike(self, module, *names):
        for name in names:
            self.monkeypatch.setattr(module, name, self._breaking(getattr(module, name)))

    def _breaking(self, function):
        def broken(*args, **options):
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Killed
            return function(*args, **options)

        return broken


def export_small_model(folder: Path, *overrides: str) -> Path:
    """A tokenizer with random weights as an exported folder: 8 tokens, images of 8 x 8 pixels, no VAE."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from flextok.config import compose
    from flextok.utils.export import export_model

    sizes = ("size.registers=8", "size.encoder_depth=1", "size.decoder_depth=1", "size.intermediate_layer=0")
    config = compose(["model=tiny", "vae=pixel", "data=digits", *sizes, *overrides])
    model = OmegaConf.to_container(config.model, resolve=True)
    return export_model(randomize(instantiate(model)), model, folder)
