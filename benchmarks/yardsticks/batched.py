"""The strongest simple way: `[batch, tokens, width]`, every sample at full length, no mask in the decoder.

Both branches of guidance run as one batch; what does not change between denoising steps is computed once. Where there
were two simple forms (one mask or two calls in the encoder, modulations spread over the tokens or broadcast over views
of the sub-sequences) the faster was kept: two calls, which were as fast as a mask on a CPU and need none elsewhere;
views where samples have times of their own, one shared row per token where they do not.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.workloads import Step
from benchmarks.yardsticks.common import Weights, Yardstick, linear, mlp, modulation, norm

causal_bias = cache(causal_lower_right)
"""By its integers: a mask of no memory on a GPU, and made outside of what counts operators."""


class Batched(Yardstick):
    """Samples of one size along the batch axis."""

    def velocity(self, step: Step) -> Tensor:
        t = step.times[:, None, None, None]
        noised = t * step.noise + (1 - t) * step.latents
        return self.decoder(self.registers(self.encoder(step.latents), step.keep_ks, step.null), noised, step.times)

    def loss(self, step: Step) -> Tensor:
        return F.mse_loss(self.velocity(step).float(), step.noise - step.latents)

    @torch.no_grad()
    def decode(self, quants: Tensor, keep_ks: list[int], noise: Tensor, *, num_steps: int, guidance: float) -> Tensor:
        batch, x = len(noise), noise
        registers = self.registers(quants, keep_ks, [False] * batch)
        if guidance != 1.0:
            null = self.weights["dec_latent_dropout.nullcond"].expand_as(registers)
            registers = torch.cat([registers, null])
        for step in range(num_steps, 0, -1):
            # All samples share the time: one row of modulation is broadcast.
            times = torch.full((1,), step / num_steps, device=noise.device)
            if guidance == 1.0:
                velocity = self.decoder(registers, x, times)
            else:
                conditional, without = self.decoder(registers, x.repeat(2, 1, 1, 1), times).split(batch)
                velocity = without + guidance * (conditional - without)
            x = x - velocity / num_steps
        return x

    def encoder(self, latents: Tensor) -> Tensor:
        patches = self.patches("enc_patch_emb", "enc_posemb_module", latents)
        registers = self.weights["enc_register_module.registers"].expand(len(patches), -1, -1)
        num_patches = patches.shape[1]
        x = torch.cat([patches, registers.to(patches.dtype)], dim=1)
        causal = causal_bias(x.shape[1] - num_patches, x.shape[1])
        x = self.trunk("enc_transformer", x, num_patches=num_patches, causal=causal)
        return self.quantize(linear(self.weights, "enc_to_latents.proj", norm(x[:, num_patches:])))

    def registers(self, quants: Tensor, keep_ks: list[int], null: list[bool]) -> Tensor:
        """`[batch, registers, width]`, all of them whatever is kept."""
        x = (
            linear(self.weights, "dec_from_latents.proj", quants)
            + self.weights["dec_registers_posemb_module.posembs"][0].mT
        )
        kept = torch.arange(x.shape[1], device=x.device) < torch.tensor(keep_ks, device=x.device)[:, None]
        x = torch.where(kept[..., None], x, self.weights["dec_nested_dropout.dropout_mask_token"].to(x.dtype))
        is_null = torch.tensor(null, device=x.device)[:, None, None]
        return torch.where(is_null, self.weights["dec_latent_dropout.nullcond"].to(x.dtype), x)

    def decoder(self, registers: Tensor, noised: Tensor, times: Tensor) -> Tensor:
        patches = self.patches("dec_noise_patch_emb", "dec_patches_posemb_module", noised)
        num_patches = patches.shape[1]
        embedding = self.time_embedding(times)
        x = torch.cat([patches, registers], dim=1)
        x = self.trunk("dec_transformer", x, num_patches=num_patches, embedding=embedding)
        shift, scale = modulation(self.weights, embedding, "dec_to_patches.")[:, None].chunk(2, dim=-1)
        return self.latents(x[:, :num_patches], shift, scale, noised.shape[1:])

    def block(
        self,
        weights: Weights,
        x: Tensor,
        *,
        num_patches: int,
        embedding: Tensor | None = None,
        causal: Tensor | None = None,
    ) -> Tensor:
        if embedding is None:
            x = x + self.attend_causal_last(weights, norm(x), num_patches, causal)
            return x + mlp(weights, norm(x))
        lengths = [num_patches, x.shape[1] - num_patches]
        rows = list(modulation(weights, embedding)[:, None].chunk(2, dim=-1))
        if len(embedding) == 1:
            # One time for the whole batch: its rows are spread over the tokens of one sample, and broadcast.
            rows = [torch.cat([row.expand(-1, n, -1) for row, n in zip(rows, lengths, strict=True)], dim=1)]
            lengths = [x.shape[1]]
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = zip(
            *(row.chunk(6, dim=-1) for row in rows), strict=True
        )
        attended = self.attend(weights, modulate(norm(x), shift_attn, scale_attn, lengths))
        x = add_gated(x, attended, gate_attn, lengths)
        return add_gated(x, mlp(weights, modulate(norm(x), shift_mlp, scale_mlp, lengths)), gate_mlp, lengths)

    def attend(self, weights: Weights, x: Tensor) -> Tensor:
        return linear(weights, "attn.proj", self.attention(*self.heads(weights, x)))

    def attend_causal_last(self, weights: Weights, x: Tensor, num_patches: int, causal: Tensor | None) -> Tensor:
        """Patches over patches, then registers over patches and the registers before them."""
        q, k, v = self.heads(weights, x)
        q_patches, q_registers = q.tensor_split([num_patches], dim=2)
        patches = self.attention(q_patches, k[:, :, :num_patches], v[:, :, :num_patches])
        registers = self.attention(q_registers, k, v, attn_mask=causal)
        return linear(weights, "attn.proj", torch.cat([patches, registers], dim=1))


def modulate(x: Tensor, shifts: Sequence[Tensor], scales: Sequence[Tensor], lengths: list[int]) -> Tensor:
    """`x * (1 + scale) + shift` over views of the sub-sequences of `lengths`, one shift and scale for each."""
    triples = zip(shifts, x.split(lengths, dim=1), scales, strict=True)
    return join([torch.addcmul(shift, part, 1 + scale) for shift, part, scale in triples])


def add_gated(x: Tensor, branch: Tensor, gates: Sequence[Tensor], lengths: list[int]) -> Tensor:
    """`x + gate * branch` over views of the sub-sequences of `lengths`, one gate for each."""
    triples = zip(x.split(lengths, dim=1), gates, branch.split(lengths, dim=1), strict=True)
    return join([torch.addcmul(part, gate, addend) for part, gate, addend in triples])


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
