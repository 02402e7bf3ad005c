"""What training minimises: the squared error of the predicted velocity, and terms beside it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flextok.flextok_wrapper import FlexTok
from flextok.flow_matching.path import target_velocity
from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList
from flextok.training.repa import RepaTerm

PASSES_KEY = "flow_passes"


class FlowPass(NamedTuple):
    """What one pass of the decoder left of each sample; nobody waits for the device."""

    errors: Tensor
    """`[batch]` float32 on the device, without gradient: mean squared error of the velocity."""
    times: Tensor
    """`[batch]` on the device: 1 is noise."""
    kept: Tensor
    """`[batch]` int64 on the host: how many tokens the decoder saw, 0 where it saw the null condition."""


class RectifiedFlowObjective(nn.Module):
    """Rectified flow: the velocity from data to noise is their difference, at every time.

    An image is encoded once and decoded from a random prefix of its tokens, from all of them, or from both, each with
    its own noise and time. `total` is the mean of these passes by their weights; a pass's loss is the mean over samples
    of the mean squared error of each, plus REPA where there is one.
    """

    def __init__(self, *, prefix_weight: float = 1.0, full_weight: float = 0.0, repa: RepaTerm | None = None) -> None:
        """A weight of 0 leaves a pass out. With full length, no encoder module may leave out registers past `keep_k`.

        Raises ValueError for a negative weight, or if both are 0.
        """
        super().__init__()
        if min(prefix_weight, full_weight) < 0 or prefix_weight + full_weight == 0:
            raise ValueError(
                f"objective.prefix_weight={prefix_weight} and objective.full_weight={full_weight} cannot be used; "
                "valid: numbers from 0 on, not both 0"
            )
        self.prefix_weight = prefix_weight
        self.full_weight = full_weight
        self.repa = repa

    def forward(self, model: FlexTok, data: DataDict) -> dict[str, Tensor]:
        """Run one training forward; beside `total` come its parts, if there are several.

        Under `PASSES_KEY` it writes a list with a `FlowPass` for each pass into `data`.

        Raises ValueError if the model cannot decode at full length but is asked to.
        """
        encoded = model.encode(data)
        passes: dict[str, tuple[float, DataDict]] = {}
        if self.full_weight > 0:
            passes["full"] = self.full_weight, _decode(model, _at_full_length(model, encoded))
        if self.prefix_weight > 0:
            passes["prefix"] = self.prefix_weight, _decode(model, encoded)
        weights = [weight / sum(weight for weight, _ in passes.values()) for weight, _ in passes.values()]
        noise_key = model.flow_matching_noise_module.noise_write_key
        errors = [velocity_errors(model, decoded, decoded[noise_key]) for _, decoded in passes.values()]
        data[PASSES_KEY] = [
            _flow_pass(model, decoded, per_sample)
            for per_sample, (_, decoded) in zip(errors, passes.values(), strict=True)
        ]
        flows = [per_sample.mean() for per_sample in errors]
        total = _weighted(weights, flows)
        losses = {f"flow_{name}": flow for name, flow in zip(passes, flows, strict=True)}
        if self.repa is not None:
            repa = _weighted(weights, self.repa(_images(model, data), [decoded for _, decoded in passes.values()]))
            losses["repa"] = repa
            total = total + self.repa.weight * repa
        return {"total": total} | (losses if len(losses) > 1 else {})


def velocity_errors(model: FlexTok, data: DataDict, noise: Sequence[Tensor]) -> Tensor:
    """The mean squared error of each sample, `[batch]`, after the decoder has run."""
    predicted = data[model.pipeline.reconst_write_key]
    clean = data[model.flow_matching_noise_module.clean_images_read_key]
    return per_sample_mse(predicted, noise, clean)


def per_sample_mse(predicted: Sequence[Tensor], noise: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """Per sample mean squared error of `predicted` to `noise - clean` in float32; sizes may differ."""
    if len({tuple(entry.shape) for entry in clean}) == 1:
        p, n, c = (PackedList.pack(entries).tensor.float() for entries in (predicted, noise, clean))
        return (p - target_velocity(c, n)).square().flatten(1).mean(1)
    rows = [per_sample_mse([p], [n], [c]) for p, n, c in zip(predicted, noise, clean, strict=True)]
    return torch.cat(rows)


def _decode(model: FlexTok, encoded: DataDict) -> DataDict:
    return model.decoder(model.flow_matching_noise_module(encoded))


def _flow_pass(model: FlexTok, decoded: DataDict, errors: Tensor) -> FlowPass:
    """A null condition that a module drew for itself, not a `DropoutSampler`, cannot be told from the others."""
    num_tokens = PackedList.pack(decoded[model.quants_write_key]).num_tokens
    modules = model.decoder.module_dict
    keep_ks = decoded.get(modules["dec_nested_dropout"].train_keep_k_write_key, num_tokens)
    null_keys = [getattr(module, "sampled_null_read_key", None) for module in modules.values()]
    null = next((decoded[key] for key in null_keys if key in decoded), [False] * len(num_tokens))
    kept = [0 if hidden else min(k, n) for hidden, k, n in zip(null, keep_ks, num_tokens, strict=True)]
    return FlowPass(errors.detach(), decoded[model.flow_matching_noise_module.timesteps_write_key], torch.tensor(kept))


def _weighted(weights: Sequence[float], losses: Sequence[Tensor] | Tensor) -> Tensor:
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def _at_full_length(model: FlexTok, encoded: DataDict) -> DataDict:
    """A copy of the dictionary from which the decoder will read that all tokens are kept."""
    for name, module in model.encoder.module_dict.items():
        if getattr(module, "sampled_keep_k_read_key", None) is not None:
            raise ValueError(
                f"model.encoder.module_dict.{name}.sampled_keep_k_read_key={module.sampled_keep_k_read_key!r} leaves "
                "out registers that objective.full_weight needs; valid: null, as objective=prefix_and_full sets it"
            )
    key = getattr(model.decoder.module_dict["dec_nested_dropout"], "sampled_keep_k_read_key", None)
    if key is None:
        raise ValueError(
            "model.decoder.module_dict.dec_nested_dropout.sampled_keep_k_read_key=None always draws keep_k, so "
            "objective.full_weight cannot keep all tokens; valid: a key, such as sampled_keep_k"
        )
    return {**encoded, key: list(PackedList.pack(encoded[model.quants_write_key]).num_tokens)}


def _images(model: FlexTok, data: DataDict) -> Sequence[Tensor]:
    key = model.vae.images_read_key
    if key not in data:
        raise ValueError(f"objective.repa needs images under {key!r}, but the data has only latents; leave it out")
    return data[key]
