"""What does an answer read off several wordings cost? `python -m benchmarks.paraphrase_fusion`

One question in five wordings of 120 tokens, a random Llama of four layers, 20 new tokens, greedy. `fused` reads the
wordings in one sequence and keeps keys and values; `fused_again` reads everything again for every token; `apart` runs
the wordings as a batch of their own and averages their logits, `apart_again` the same without a cache. Before anything
is timed, each is checked to give the tokens of its counterpart. The masks of longer prompts are timed apart.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.command import parse, parser, write
from benchmarks.harness import measure, measure_in_turn, median_ratio, print_table
from flextok.attention.masks import segment_fusion, segment_ids_from_spans
from flextok.attention.segment_blocks import segment_block_mask
from flextok.fusion import generate_ensemble, generate_fused, pack_segments

TAIL = 3
MASK_LENGTHS = (1_024, 8_192, 131_072)
EVALUATED_UP_TO = 8_192
"""Longer masks are not evaluated everywhere: on a CPU that takes memory and minutes."""


def main(arguments: Sequence[str] | None = None) -> None:
    command = parser("paraphrase_fusion", __doc__, repeats=5)
    command.add_argument("--layers", type=int, default=4)
    command.add_argument("--width", type=int, default=512)
    command.add_argument("--wordings", type=int, default=5)
    command.add_argument("--length", type=int, default=120, help="tokens of a wording, default 120")
    command.add_argument("--new-tokens", type=int, default=20)
    options = parse(command, arguments)
    device: torch.device = options.device
    model = random_model(options.layers, options.width, device)
    ways = ways_to_answer(model, options.wordings, options.length, options.new_tokens)
    tokens = {name: way() for name, way in ways.items()}
    for name in ("fused", "apart"):
        if not torch.equal(tokens[name], tokens[f"{name}_again"]):
            raise AssertionError(f"{name} gives other tokens than {name}_again")
    seconds = measure_in_turn(ways, repeats=options.repeats, warmup=1, device=device)
    rows = [
        {
            "way": name,
            "seconds": sorted(of_way)[len(of_way) // 2],
            "times_as_long_as_fused": median_ratio(of_way, seconds["fused"]),
        }
        for name, of_way in seconds.items()
    ]
    print_table(rows)
    masks = [*measure_masks(options.wordings, options.repeats, device)]
    print_table(masks)
    sizes = {name: getattr(options, name) for name in ("layers", "width", "wordings", "length", "new_tokens")}
    write(options, {**sizes, "rows": rows, "seconds": seconds, "block_masks": masks})


def random_model(layers: int, width: int, device: torch.device) -> PreTrainedModel:
    """A Llama with grouped heads of 64 and weights so large that no two tokens are nearly as probable."""
    torch.manual_seed(0)
    heads = width // 64
    config = LlamaConfig(
        vocab_size=2_048,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        initializer_range=0.1,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(device).eval()


def ways_to_answer(
    model: PreTrainedModel, num_wordings: int, length: int, max_new_tokens: int
) -> dict[str, Callable[[], Tensor]]:
    """Ways to the new tokens, each int64 `[1, max_new_tokens]`."""
    generator = torch.Generator().manual_seed(1)
    *wordings, tail = (
        torch.randint(3, 2_048, (size,), generator=generator).tolist() for size in [*[length] * num_wordings, TAIL]
    )
    fused = partial(generate_fused, model, [pack_segments(wordings, tail=tail)], max_new_tokens=max_new_tokens)
    prompts = [[*wording, *tail] for wording in wordings]
    apart = partial(
        generate_ensemble, model, [[prompt] for prompt in prompts], method="avg", max_new_tokens=max_new_tokens
    )
    return {
        "fused": lambda: fused().sequences,
        "fused_again": lambda: fused(use_cache=False).sequences,
        "apart": lambda: apart().sequences,
        "apart_again": lambda: apart_again(model, prompts, max_new_tokens),
    }


@torch.no_grad()
def apart_again(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
    """The average of the logits of prompts of equal length, which are read again for every token."""
    ids, new = torch.tensor(prompts, device=model.device), []
    for _ in range(max_new_tokens):
        token = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].mean(0).argmax()
        new.append(token)
        ids = torch.cat([ids, token.expand(len(ids), 1)], dim=1)
    return torch.stack(new)[None]


def measure_masks(num_wordings: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds for the block mask of wordings of equal lengths: written from their places, and evaluated."""
    rows = []
    for length in MASK_LENGTHS:
        step = (length - TAIL) // num_wordings
        spans = [(step * n, step * (n + 1)) for n in range(num_wordings)]
        ids, start = segment_ids_from_spans(spans, length, device), step * num_wordings
        written = partial(segment_block_mask, ids, start)
        evaluated = partial(
            create_block_mask, segment_fusion(ids, start), None, None, length, length, device=str(device)
        )
        row = {"tokens": length, "written_ms": 1e3 * measure(written, repeats=repeats, warmup=1, device=device)}
        if length <= EVALUATED_UP_TO:
            if not torch.equal(written().to_dense(), evaluated().to_dense()):
                raise AssertionError(f"the two block masks of {length} tokens differ")
            row["evaluated_ms"] = 1e3 * measure(evaluated, repeats=1, warmup=1, device=device)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
