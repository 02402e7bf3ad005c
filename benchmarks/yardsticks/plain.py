"""The published order of operations, as a specification to be measured against.

A batch is a list of samples. Every forward loops over them to embed, pack, unpack, noise and guide; all tokens lie in
one row of full length whose dense mask is built anew; modulations are spread over the tokens in every block; the
register branch is recomputed in every denoising step, on a deep copy of the data, once per branch of guidance.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Step
from benchmarks.yardsticks.common import Weights, Yardstick, linear, mlp, modulation, norm


class Plain(Yardstick):
    """The published way."""

    def velocity(self, step: Step) -> Tensor:
        data = {
            "latents": list(step.latents.split(1)),
            "noise": list(step.noise.split(1)),
            "times": step.times,
            "keep_ks": step.keep_ks,
            "null": step.null,
        }
        return torch.cat(self.decoder(self.noised(self.encoder(data)))["velocity"])

    def loss(self, step: Step) -> Tensor:
        errors = [
            F.mse_loss(predicted.float(), noise - clean)
            for predicted, noise, clean in zip(self.velocity(step), step.noise, step.latents, strict=True)
        ]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def decode(self, quants: Tensor, keep_ks: list[int], noise: Tensor, *, num_steps: int, guidance: float) -> Tensor:
        batch = len(noise)
        data: dict[str, Any] = {"quants": list(quants.split(1)), "keep_ks": keep_ks, "noised": list(noise.split(1))}
        for step in range(num_steps, 0, -1):
            data["times"] = torch.full((batch,), step / num_steps, device=noise.device)
            velocity = self.decoder(deepcopy(data) | {"null": [False] * batch})["velocity"]
            if guidance != 1.0:
                without = self.decoder(deepcopy(data) | {"null": [True] * batch})["velocity"]
                velocity = [u + guidance * (c - u) for c, u in zip(velocity, without, strict=True)]
            data["noised"] = [x - v / num_steps for x, v in zip(data["noised"], velocity, strict=True)]
        return torch.cat(data["noised"])

    def encoder(self, data: dict[str, Any]) -> dict[str, Any]:
        patches = [self.patches("enc_patch_emb", "enc_posemb_module", sample) for sample in data["latents"]]
        registers = [self.weights["enc_register_module.registers"][None]] * len(patches)
        row, lengths = pack(patches, registers)
        row = self.trunk("enc_transformer", row, mask=dense_mask(lengths, row.device, causal_last=True))
        _, registers = unpack(row, lengths)
        data["quants"] = [
            self.quantize(linear(self.weights, "enc_to_latents.proj", norm(entry))) for entry in registers
        ]
        return data

    def noised(self, data: dict[str, Any]) -> dict[str, Any]:
        triples = zip(data["times"], data["noise"], data["latents"], strict=True)
        data["noised"] = [t * noise + (1 - t) * clean for t, noise, clean in triples]
        return data

    def decoder(self, data: dict[str, Any]) -> dict[str, Any]:
        registers = [
            self.registers(*sample) for sample in zip(data["quants"], data["keep_ks"], data["null"], strict=True)
        ]
        patches = [self.patches("dec_noise_patch_emb", "dec_patches_posemb_module", x) for x in data["noised"]]
        embedding = self.time_embedding(data["times"])
        row, lengths = pack(patches, registers)
        mask = dense_mask(lengths, row.device, causal_last=False)
        row = self.trunk("dec_transformer", row, mask=mask, embedding=embedding, lengths=lengths)
        patches, _ = unpack(row, lengths)
        shift, scale = modulation(self.weights, embedding, "dec_to_patches.")[:, None].chunk(2, dim=-1)
        samples = zip(patches, shift.split(1), scale.split(1), data["noised"], strict=True)
        data["velocity"] = [self.latents(entry, a, b, x.shape[1:]) for entry, a, b, x in samples]
        return data

    def registers(self, quants: Tensor, keep_k: int, null: bool) -> Tensor:
        """The registers of one sample, `[1, registers, width]`, all of them whatever is kept."""
        x = (
            linear(self.weights, "dec_from_latents.proj", quants)
            + self.weights["dec_registers_posemb_module.posembs"][0].mT
        )
        mask_token = self.weights["dec_nested_dropout.dropout_mask_token"].to(x.dtype)
        x = torch.cat([x[:, :keep_k], mask_token.expand(1, x.shape[1] - keep_k, -1)], dim=1)
        return self.weights["dec_latent_dropout.nullcond"].to(x.dtype).expand_as(x) if null else x

    def block(
        self,
        weights: Weights,
        x: Tensor,
        *,
        mask: Tensor,
        embedding: Tensor | None = None,
        lengths: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        if embedding is None or lengths is None:
            x = x + self.attend(weights, norm(x), mask)
            return x + mlp(weights, norm(x))
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = spread(
            modulation(weights, embedding), lengths
        ).chunk(6, dim=-1)
        x = x + gate_attn * self.attend(weights, norm(x) * (1 + scale_attn) + shift_attn, mask)
        return x + gate_mlp * mlp(weights, norm(x) * (1 + scale_mlp) + shift_mlp)

    def attend(self, weights: Weights, x: Tensor, mask: Tensor) -> Tensor:
        out = self.attention(*self.heads(weights, x), attn_mask=mask)
        return linear(weights, "attn.proj", out)


def pack(patches: list[Tensor], registers: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """One row `[1, tokens, width]`, sample by sample, and how many patches and registers each has."""
    pairs = list(zip(patches, registers, strict=True))
    row = torch.cat([torch.cat(pair, dim=1) for pair in pairs], dim=1)
    return row, [(p.shape[1], r.shape[1]) for p, r in pairs]


def unpack(row: Tensor, lengths: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Patches and registers of each sample."""
    samples = row.split([sum(pair) for pair in lengths], dim=1)
    pairs = [sample.split(list(pair), dim=1) for sample, pair in zip(samples, lengths, strict=True)]
    return [patches for patches, _ in pairs], [registers for _, registers in pairs]


def spread(modulation: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
    """`[batch, 2 * n]` to one row per token, `[1, tokens, n]`: first half for patches, second half for registers."""
    rows = []
    for sample, pair in zip(modulation, lengths, strict=True):
        rows += [half.expand(length, -1) for half, length in zip(sample.chunk(2), pair, strict=True)]
    return torch.cat(rows)[None]


def dense_mask(lengths: list[tuple[int, int]], device: torch.device, *, causal_last: bool) -> Tensor:
    """bool `[tokens, tokens]`: same sample and, with `causal_last`, the key is a patch or not after the query."""
    totals = torch.tensor([sum(pair) for pair in lengths], device=device)
    sample = torch.arange(len(lengths), device=device).repeat_interleave(totals)
    mask = sample[:, None] == sample
    if causal_last:
        place = torch.arange(len(sample), device=device)
        is_patch = torch.cat([torch.arange(sum(pair), device=device) < pair[0] for pair in lengths])
        mask = mask & ((place[:, None] >= place) | is_patch)
    return mask
