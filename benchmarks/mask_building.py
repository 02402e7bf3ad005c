"""What does the block mask of a packed row cost, and how does that grow with its length?

    python -m benchmarks.mask_building [--device cuda] [--compiled]

Compares, on the same layouts and in one run, the ways to a `BlockMask`: written analytically without and with query
lists, analytic with the query lists derived by `BlockMask.from_kv_blocks`, and `create_block_mask` compiled and eager,
which evaluate tokens x tokens values. Every way is given the mask function; the tensors in it, one value per token, are
built once per layout whatever the way, and are timed apart as `token_table`.
"""

import argparse
import random
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.harness import machine, measure, print_table, write_results
from flextok.attention.block_masks import packed_block_mask
from flextok.attention.layout import SequenceLayout

LENGTHS = tuple(2**power for power in range(10, 18))
NUM_PATCHES = NUM_REGISTERS = 256
# Eager, each of several bool tensors of tokens x tokens takes 256 MiB at 16,384 tokens and 16 GiB at 131,072. Compiled,
# nothing of that size is stored, but a CPU still takes seconds to evaluate it.
EAGER_UP_TO = 16_384
COMPILED_UP_TO = {"cpu": 16_384, "cuda": 131_072}


def equal_samples(length: int) -> SequenceLayout:
    """Patches and all registers of each sample, everything visible within it."""
    return SequenceLayout(((NUM_PATCHES, NUM_REGISTERS),) * (length // (NUM_PATCHES + NUM_REGISTERS)))


def ragged_samples(length: int) -> SequenceLayout:
    """Patches and `keep_k` registers, `keep_k` uniform, as many samples as fit; registers in order; padding."""
    draw, samples, num_tokens = random.Random(0), [], 0
    while num_tokens + NUM_PATCHES + (keep_k := draw.randint(1, NUM_REGISTERS)) <= length:
        samples.append((NUM_PATCHES, keep_k))
        num_tokens += NUM_PATCHES + keep_k
    return SequenceLayout(tuple(samples), mode="causal_last", total=length)


def ways(
    layout: SequenceLayout, device: torch.device, compiled: Callable[..., BlockMask] | None
) -> dict[str, Callable[[], object] | None]:
    """The ways to the block mask of `layout`; None where one is left out."""
    length, mask_mod = layout.row_length, layout.mask_mod(device)

    def derived() -> BlockMask:
        keys = packed_block_mask(layout, device, with_queries=False)
        return BlockMask.from_kv_blocks(
            keys.kv_num_blocks,
            keys.kv_indices,
            keys.full_kv_num_blocks,
            keys.full_kv_indices,
            BLOCK_SIZE=keys.BLOCK_SIZE,
            mask_mod=mask_mod,
            seq_lengths=keys.seq_lengths,
        )

    def evaluated(create: Callable[..., BlockMask]) -> Callable[[], object]:
        return lambda: create(mask_mod, None, None, length, length, device=device)

    return {
        "token_table": lambda: replace(layout).table(device),
        "analytic_keys_only": lambda: packed_block_mask(layout, device, with_queries=False),
        "analytic": lambda: packed_block_mask(layout, device),
        "from_kv_blocks": derived,
        "compiled": evaluated(compiled) if compiled and length <= COMPILED_UP_TO[device.type] else None,
        "eager": evaluated(create_block_mask) if length <= EAGER_UP_TO else None,
    }


def measure_layout(
    layout: SequenceLayout, device: torch.device, compiled: Callable[..., BlockMask] | None, repeats: int
) -> dict[str, float | None]:
    """Milliseconds of each way, and how many times longer eager creation takes than analytic."""
    row: dict[str, float | None] = {}
    for name, build in ways(layout, device, compiled).items():
        slow = name in ("compiled", "eager")
        counts = {"repeats": min(repeats, 5), "warmup": 2} if slow else {"repeats": repeats, "warmup": 5}
        row[f"{name}_ms"] = None if build is None else 1000 * measure(build, device=device, **counts)
    eager, analytic = row["eager_ms"], row["analytic_ms"]
    row["eager/analytic"] = eager / analytic if eager and analytic else None
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mask_building.json"))
    parser.add_argument("--repeats", type=int, default=51, help="calls of each way; at most 5 of the slow ones")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="also compile create_block_mask; by default on CUDA only, since it takes tens of seconds on a CPU",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with_compiled = args.device.type == "cuda" if args.compiled is None else args.compiled
    compiled = torch.compile(create_block_mask) if with_compiled else None

    rows: list[dict[str, Any]] = []
    for make in (equal_samples, ragged_samples):
        for length in LENGTHS:
            layout = make(length)
            facts = {"layout": make.__name__, "tokens": length, "samples": len(layout.lengths)}
            rows.append(facts | measure_layout(layout, args.device, compiled, args.repeats))
    notes = [
        "medians in milliseconds, blocks of 128 tokens; the token table is part of no other column",
        f"eager left out above {EAGER_UP_TO:,} tokens: its tensors of tokens x tokens would fill the memory",
        f"compiled left out above {COMPILED_UP_TO[args.device.type]:,} tokens: evaluation still takes tokens x tokens"
        if with_compiled
        else "compiled left out: it was not asked for (--compiled)",
    ]
    print_table(rows)
    print("\n".join(notes))
    command = shlex.join(["python", "-m", "benchmarks.mask_building", *sys.argv[1:]])
    settings = {"command": command, "repeats": args.repeats, "num_patches": NUM_PATCHES, "num_registers": NUM_REGISTERS}
    write_results(args.out, {"machine": machine(args.device), "settings": settings, "notes": notes, "rows": rows})


if __name__ == "__main__":
    main()
