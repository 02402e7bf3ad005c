"""What do the smaller savings bring, taken or declined? `python -m benchmarks.savings`

One row per saving: seconds of the way that wastes, seconds of the way that saves, and how many times faster it is. The
numbers of docs/performance.md that no other benchmark holds.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidates import Ours
from benchmarks.command import parse, parser, write
from benchmarks.harness import measure_in_turn, median_ratio, print_table
from benchmarks.workloads import WORKLOADS, build_model, draw_decoding
from flextok.utils.checkpoint import load_model_from_safetensors, load_safetensors, save_safetensors
from flextok.utils.export import official_config

Ways = tuple[Callable[[], object], Callable[[], object]]
SIZES = {"samples": 16, "tokens": 128, "heads": 4, "head_dim": 64}


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("savings", __doc__, repeats=20)
    command.add_argument("--checkpoint-size", default="flextok_d12_d12", help="which size E17 loads")
    options = parse(command, arguments)
    rows = []
    for name, (wasting, saving), repeats in _cases(options.device, options.checkpoint_size, options.repeats):
        fns = {"wasting": wasting, "saving": saving}
        times = measure_in_turn(fns, repeats=repeats, warmup=1, device=options.device)
        rows.append(
            {
                "saving": name,
                "wasting_seconds": median(times["wasting"]),
                "saving_seconds": median(times["saving"]),
                "times_faster": median_ratio(times["wasting"], times["saving"]),
            }
        )
    print_table(rows)
    write(options, {"sizes": SIZES, "checkpoint_size": options.checkpoint_size, "rows": rows})


def _cases(device: torch.device, checkpoint_size: str, repeats: int) -> Iterator[tuple[str, Ways, int]]:
    yield "E6 causal_last in two calls instead of one with a mask", causal_last(device), repeats
    for batch in (16, 1):
        yield f"E8 a guided step without computing its modulation, batch {batch}", modulation(device, batch), repeats
        yield f"E9 decoding with hoisted modules, 4 steps, batch {batch}", hoisting(device, batch), repeats // 2
    for num_tokens in (2048, 128):
        yield f"E13 q, k and v in one product, {num_tokens} tokens", joined(device, num_tokens, (256,) * 3), repeats
        yield (
            f"E13 both MLP inputs in one product, {num_tokens} tokens",
            joined(device, num_tokens, (682,) * 2),
            repeats,
        )
    yield "E15 a guided step without frequencies and positions, batch 1", tables(device), repeats
    with tempfile.TemporaryDirectory() as folder:
        yield (
            f"E17 {checkpoint_size} from the meta device, mapped weights assigned",
            loading(folder, checkpoint_size),
            3,
        )


def causal_last(device: torch.device) -> Ways:
    """Forward and backward over `SIZES`, half of the tokens before the last sub-sequence."""
    samples, tokens, heads, head_dim = (SIZES[name] for name in ("samples", "tokens", "heads", "head_dim"))
    half = tokens // 2
    q, k, v = (torch.randn(samples, tokens, heads, head_dim, device=device, requires_grad=True) for _ in range(3))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
    hidden[:, :half] = False
    mask = torch.zeros(tokens, tokens, device=device).masked_fill(hidden, float("-inf"))
    weight = torch.randn_like(q)

    def one_call() -> object:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask)
        return torch.autograd.grad(out.transpose(1, 2), (q, k, v), weight)

    def two_calls() -> object:
        a, b, c = (x.transpose(1, 2) for x in (q, k, v))
        first = F.scaled_dot_product_attention(a[:, :, :half], b[:, :, :half], c[:, :, :half])
        last = F.scaled_dot_product_attention(a[:, :, half:], b, c, attn_mask=mask[half:])
        return torch.autograd.grad(torch.cat([first, last], dim=2).transpose(1, 2), (q, k, v), weight)

    return one_call, two_calls


def modulation(device: torch.device, batch: int) -> Ways:
    """A guided step, and one whose blocks are given the rows of their modulation."""
    ours, decode = _guided_step(device, batch)
    blocks: Any = ours.trunks["decoder"].blocks
    linears = [block.adaLN_modulation for block in blocks]
    with torch.no_grad():
        given = [_Given(linear(torch.zeros(1, linear[1].in_features, device=device))) for linear in linears]

    def use(modules: Sequence[nn.Module]) -> None:
        for block, module in zip(blocks, modules, strict=True):
            block.adaLN_modulation = module

    def without() -> object:
        use(given)
        try:
            return decode()
        finally:
            use(linears)

    return decode, without


def hoisting(device: torch.device, batch: int) -> Ways:
    """Decoding with a model that is opaque to the sampler, and as it is."""
    ours, decode = _guided_step(device, batch, num_steps=4)
    decoder = ours.model.pipeline.model

    def opaque() -> object:
        ours.model.pipeline.model = _Opaque(decoder)
        try:
            return decode()
        finally:
            ours.model.pipeline.model = decoder

    return opaque, decode


def joined(device: torch.device, num_tokens: int, widths: tuple[int, ...]) -> Ways:
    """Forward and backward of linear maps of one input, apart and with their weights joined in each call."""
    x = torch.randn(num_tokens, 256, device=device, requires_grad=True)
    weights = [torch.randn(width, 256, device=device, requires_grad=True) for width in widths]
    grads = [torch.randn(num_tokens, width, device=device) for width in widths]

    def apart() -> object:
        return torch.autograd.grad([F.linear(x, weight) for weight in weights], [x, *weights], grads)

    def together() -> object:
        return torch.autograd.grad(F.linear(x, torch.cat(weights)).split(list(widths), dim=-1), [x, *weights], grads)

    return apart, together


def tables(device: torch.device) -> Ways:
    """A guided step, and one that finds the frequencies of the time embedding and the cropped positions ready."""
    ours, decode = _guided_step(device, 1)
    modules: Any = ours.model.decoder.module_dict
    embedder, posemb = modules["dec_time_embedder"], modules["dec_patches_posemb_module"]
    waves = embedder.timestep_embedding(torch.ones(1, device=device), embedder.frequency_embedding_size)
    positions = posemb._channels_last((8, 8))

    def ready() -> object:
        embedder.timestep_embedding = lambda t, dim: waves
        posemb._channels_last = lambda shape: positions
        try:
            return decode()
        finally:
            del embedder.timestep_embedding, posemb._channels_last

    return decode, ready


def loading(folder: str, size: str) -> Ways:
    """Loading a checkpoint as the package does, and into a model without memory."""
    config = official_config(WORKLOADS[size].config("mask_token").model)
    file = Path(folder) / "model.safetensors"
    save_safetensors(hydra.utils.instantiate(config, _convert_="all").state_dict(), file, config)

    def assigned() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = hydra.utils.instantiate(config, _convert_="all")
        model.load_state_dict(load_safetensors(file, return_metadata=False), assign=True)
        return model

    return lambda: load_model_from_safetensors(file), assigned


class _Given(nn.Module):
    """Answers with the same rows whatever it is asked."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, emb: Tensor) -> Tensor:
        return self.rows


class _Opaque:
    """A decoder of which the sampler sees nothing but its call."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.device = next(decoder.parameters()).device

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        return self.decoder(data)


def _guided_step(device: torch.device, batch: int, num_steps: int = 1) -> tuple[Ours, Callable[[], object]]:
    workload = WORKLOADS["bench"]
    ours = Ours(build_model(workload, "packed", device).eval())
    quants, noise = draw_decoding(workload, batch=batch, device=device)
    return ours, lambda: ours.decode(quants, [4] * batch, noise, num_steps=num_steps, guidance=3.0)


if __name__ == "__main__":
    main()
