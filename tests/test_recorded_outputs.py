"""The package gives the recorded outputs of the published inference code and leaves its inputs alone."""

import json
from typing import Any

import pytest
import torch
from hydra.utils import get_object, instantiate
from safetensors import safe_open
from torch import Tensor, nn

from tests.support import (
    RECORDED,
    Untouched,
    assert_close,
    recorded_cases,
    recorded_inputs,
    recorded_model,
    recorded_tensors,
)

STEMS = ("flextok_cases", "attn_masked_cases", "modules_cases")
ALL_CASES = [
    pytest.param(stem, case, id=f"{stem.removesuffix('_cases')}-{case['name']}")
    for stem in STEMS
    for case in recorded_cases(stem)
]


@pytest.mark.parametrize(("stem", "case"), ALL_CASES)
def test_recorded_output_is_reproduced(stem, case, recorded_folder, monkeypatch):
    inputs = recorded_inputs(stem, case)
    untouched = Untouched(inputs)
    if case["kind"] == "model":
        results = MODEL_OPS[case["op"]](case, inputs, monkeypatch)
    else:
        results = KINDS[case["kind"]](case, inputs, recorded_tensors(stem, case["name"], "state"))
    untouched.check()
    for key in case.get("absent", []):
        assert key not in results, f"{key!r} should not be in the dictionary"
    compare(results, recorded_tensors(stem, case["name"], "out"), case)


def test_every_recorded_case_is_run():
    assert len(ALL_CASES) == 159


def compare(results: dict[str, Any], expected: dict[str, Tensor], case: dict[str, Any]) -> None:
    tol, squeeze = case.get("tol", 1e-4), case.get("squeeze", False)
    num_entries: dict[str, int] = {}
    for name, tensor in expected.items():
        key, _, index = name.rpartition(".")
        if key in results and index.isdigit():
            num_entries[key] = num_entries.get(key, 0) + 1
            actual = results[key][int(index)]
        else:
            actual = results[name]
        if squeeze:
            actual, tensor = actual.squeeze(), tensor.squeeze()
        assert_close(actual, tensor, tol, name)
    for key, count in num_entries.items():
        assert len(results[key]) == count, f"{key}: {len(results[key])} entries, expected {count}"


# Single modules and functions


def build(case: dict[str, Any], state: dict[str, Tensor]) -> Any:
    built = instantiate({"_target_": case["target"], **case.get("kwargs", {})})
    if isinstance(built, nn.Module):
        built.load_state_dict(state, strict=True)
        built.train(case.get("train", False))
    return built


def packing_function(table: list[list[int]]):
    """Chunk `j` of row `i` repeated `table[i][j]` times: what a packer writes for adaLN embeddings."""

    def pack(emb: Tensor) -> Tensor:
        rows = [
            chunk.expand(length, -1)
            for row, lengths in zip(emb, table, strict=True)
            for chunk, length in zip(row.chunk(len(lengths)), lengths, strict=True)
        ]
        return torch.cat(rows)[None]

    return pack


def position_dependent_rope(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def wave(x: Tensor) -> Tensor:
        return torch.cos(0.1 * torch.arange(x.shape[2], dtype=x.dtype))[:, None]

    return q * wave(q), k * wave(k), v + 0.05


def call_arguments(case: dict[str, Any], inputs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    def value(spec: dict[str, Any]) -> Any:
        ((kind, content),) = spec.items()
        return {
            "t": lambda: inputs[content],
            "v": lambda: content,
            "packing": lambda: packing_function(content),
            "rope": lambda: position_dependent_rope,
        }[kind]()

    named = case.get("call_kwargs") or {}
    return [value(spec) for spec in case["args"]], {name: value(spec) for name, spec in named.items()}


def returned(value: Any) -> dict[str, Any]:
    return {f"ret{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {"ret": value}


@torch.no_grad()
def run_module(case, inputs, state):
    packing = {key: packing_function(table) for key, table in case.get("packing", {}).items()}
    data = inputs | case.get("extra", {}) | packing
    return build(case, state)(data)


@torch.no_grad()
def run_method(case, inputs, state):
    built = build(case, state)
    args, kwargs = call_arguments(case, inputs)
    call = built if case["method"] is None else getattr(built, case["method"])
    return returned(call(*args, **kwargs))


def run_function(case, inputs, state):
    args, kwargs = call_arguments(case, inputs)
    return returned(get_object(case["target"])(*args, **kwargs))


def run_guidance(case, inputs, state):
    from flextok.flow_matching.cfg_utils import MomentumBuffer, normalized_guidance

    settings = {name: case[name] for name in ("eta", "norm_threshold")}
    buffer = MomentumBuffer(case["momentum"])
    steps = zip(inputs["cond"], inputs["uncond"], strict=True)
    return {
        f"step{i}": normalized_guidance(cond, uncond, case["scale"], momentum_buffer=buffer, **settings)
        for i, (cond, uncond) in enumerate(steps)
    }


def run_noise(case, inputs, state):
    module = build(case, state)
    torch.manual_seed(case["seed"])
    return module(dict(inputs))


def run_nested_train(case, inputs, state):
    """`keep_k` follows the recorded probabilities; kept tokens stay, dropped ones become the mask token."""
    module, num_tokens, batch = build(case, state), case["N"], 10
    counts = dict.fromkeys(map(int, case["probs"]), 0)
    for _ in range(case["draws"] // batch):
        tokens = [torch.randn(1, num_tokens, case["dim"]) for _ in range(batch)]
        data = module({case["key"]: tokens})
        for before, after, keep_k in zip(tokens, data[case["key"]], data["train_keep_k"], strict=True):
            assert int(keep_k) in counts, f"keep_k {keep_k} is outside the distribution"
            counts[int(keep_k)] += 1
            assert torch.equal(after[:, :keep_k], before[:, :keep_k])
            assert (after[:, keep_k:] == state["dropout_mask_token"]).all()
    assert_distribution(counts, {int(k): p for k, p in case["probs"].items()}, case["draws"])
    return {}


def assert_distribution(counts: dict[int, int], probs: dict[int, float], draws: int) -> None:
    chi_square = sum((counts[k] - draws * p) ** 2 / (draws * p) for k, p in probs.items())
    freedom = len(probs) - 1
    # Wilson-Hilferty: a correct sampler exceeds this once in 10,000 times (and the seed is fixed).
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit, f"chi-square {chi_square:.1f} over {limit:.1f}: {counts}"


KINDS = {
    "module": run_module,
    "method": run_method,
    "function": run_function,
    "guidance": run_guidance,
    "noise": run_noise,
    "nested_train": run_nested_train,
}


# Whole models


def check_state_dict(case, inputs, monkeypatch):
    model = recorded_model(case["ckpt"])
    with safe_open(RECORDED / case["ckpt"], "pt") as file:
        assert set(model.state_dict()) == set(file.keys())
    assert list(model.encoder.module_dict) == case["params"]["encoder_order"]
    assert list(model.decoder.module_dict) == case["params"]["decoder_order"]
    return {}


@torch.no_grad()
def run_hub(case, inputs, monkeypatch):
    from flextok import FlexTokFromHub

    model = FlexTokFromHub.from_pretrained(str(RECORDED / case["ckpt"])).eval()
    return model.encode(dict(inputs))


@torch.no_grad()
def run_encode(case, inputs, monkeypatch):
    return recorded_model(case["ckpt"]).encode(dict(inputs))


@torch.no_grad()
def run_vae_encode(case, inputs, monkeypatch):
    return recorded_model(case["ckpt"]).vae.encode(dict(inputs))


@torch.no_grad()
def run_vae_decode(case, inputs, monkeypatch):
    return recorded_model(case["ckpt"]).vae.decode(dict(inputs))


@torch.no_grad()
def run_tokenize(case, inputs, monkeypatch):
    return {"tokens": recorded_model(case["ckpt"]).tokenize(inputs["rgb"])}


@torch.no_grad()
def run_velocity(case, inputs, monkeypatch):
    return recorded_model(case["ckpt"]).decoder(inputs | case["params"])


def run_pipeline(case, inputs, monkeypatch):
    model, params = recorded_model(case["ckpt"]), case["params"]
    monkeypatch.setattr(model.pipeline, "noise_read_key", "init_noise")
    guidance = params.get("guidance_scale")
    if "guidance_fn" in params:
        a, b = params["guidance_fn"]

        def guidance(t: float) -> float:
            return a + b * t

    data = inputs | {key: params[key] for key in ("eval_keep_k",) if key in params}
    return model.pipeline(
        data,
        timesteps=params["timesteps"],
        vae_image_sizes=[tuple(size) for size in params["vae_image_sizes"]],
        verbose=False,
        guidance_scale=guidance,
        perform_norm_guidance=params.get("apg", False),
    )


def run_detokenize(case, inputs, monkeypatch):
    model, params = recorded_model(case["ckpt"]), case["params"]
    probe = torch.randn(params["noise_shape"], generator=torch.Generator().manual_seed(params["seed"]))
    assert_close(probe, inputs["probe_noise"], 1e-6, "first draw of the generator")
    images = model.detokenize(
        inputs["tokens"],
        vae_image_sizes=params["vae_image_sizes"],
        timesteps=params["timesteps"],
        generator=torch.Generator().manual_seed(params["seed"]),
        verbose=False,
        guidance_scale=params["guidance_scale"],
        perform_norm_guidance=params["apg"],
    )
    return {"rgb_reconst": images}


def run_train_grad(case, inputs, monkeypatch):
    model, params = recorded_model(case["ckpt"]), case["params"]
    clean, noise, sigmas = inputs["vae_latents"], inputs["noise"], inputs["sigmas"]
    data = model.encode({"vae_latents": clean, "eval_keep_k": params["eval_keep_k"]})
    data["vae_latents_noised"] = [s * n + (1 - s) * x for s, n, x in zip(sigmas, noise, clean, strict=True)]
    data["timesteps"] = sigmas
    velocities = model.decoder(data)["vae_latents_reconst"]
    targets = [n - x for n, x in zip(noise, clean, strict=True)]
    errors = [(v - target).square().mean() for v, target in zip(velocities, targets, strict=True)]
    loss = torch.stack(errors).mean()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [named[name] for name in params["params"]])
    return {"loss": loss} | {f"grad/{name}": g for name, g in zip(params["params"], gradients, strict=True)}


MODEL_OPS = {
    "state_dict": check_state_dict,
    "hub": run_hub,
    "encode": run_encode,
    "vae_encode": run_vae_encode,
    "vae_decode": run_vae_decode,
    "tokenize": run_tokenize,
    "velocity": run_velocity,
    "pipeline": run_pipeline,
    "detokenize": run_detokenize,
    "train_grad": run_train_grad,
}


def test_config_json_and_checkpoint_metadata_describe_the_same_model():
    from flextok.utils.checkpoint import load_safetensors

    _, from_metadata = load_safetensors(str(RECORDED / "tiny_flextok" / "model.safetensors"))
    assert from_metadata == json.loads((RECORDED / "tiny_flextok" / "config.json").read_text())
