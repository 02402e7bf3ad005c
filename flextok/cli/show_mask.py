"""Show which tokens attend to which in a trunk of a model, as text and as a picture.

  flextok show-mask model=tiny vae=pixel data=digits --keep-k 4            any overrides of configs/train.yaml
  flextok show-mask experiment=digits --batch 2 --keep-k 4,9 --png mask.png
  flextok show-mask runs/digits/2025-01-31_12-00-00 --part encoder         a run, or a checkpoint

The modules of the model run up to the packer that states the mask, over shapes alone: no weight is read, so the
largest model takes seconds, too. Without --keep-k all registers are kept; with it the mask is that of training, whose
encoder leaves the others out. Overrides stand before the options.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flextok.attention.layout import SequenceLayout

TRUNKS = ("encoder", "decoder")
_PLAIN_NAMES = {"register": "registers", "patch": "patches"}


@dataclass(frozen=True)
class TrunkMask:
    """What a trunk's packer says about its row, and how many registers of each sample were to be kept."""

    packer_name: str
    subsequences: list[str]
    layout: "SequenceLayout"
    keep_ks: list[int] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        metavar="OVERRIDE|PATH",
        nargs="*",
        help="overrides of the training config, or one existing path",
    )
    parser.add_argument("--part", choices=TRUNKS, default="decoder", help="whose mask (default: decoder)")
    parser.add_argument(
        "--keep-k",
        metavar="K[,K...]",
        type=_numbers,
        help="registers kept by nested dropout: one number for all samples, or one each",
    )
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="samples packed in the row (default: 1)")
    parser.add_argument(
        "--budget", metavar="N", type=int, default=25, help="positions shown as text at most (default: 25)"
    )
    parser.add_argument("--png", metavar="FILE", type=Path, help="also write the whole mask as a picture")
    parser.add_argument(
        "--trust", action="store_true", help="build whatever the config of a run names; only for runs of your own"
    )


def run(args: argparse.Namespace) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from flextok.attention.visualize import render_mask, save_mask_png
    from flextok.cli.model_config import read_model_config
    from flextok.config import describe_error

    try:
        config, latent_shape = read_model_config(args.what, trust=args.trust)
        found = trunk_mask(config, latent_shape, args.part, batch=args.batch, keep_ks=args.keep_k)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(describe_error(error)) from error
    except KeyError as error:
        raise ValueError(
            f"{error} is read by a module before the packer of the {args.part}, and nobody writes it"
        ) from error
    names, spans = zip(*segments_of(found), strict=True)
    mask = found.layout.dense_mask()
    title = f"{args.part}, {found.packer_name}: {len(mask)} tokens, mask_mode={found.layout.mode}"
    print(title)
    print(render_mask(mask, spans, budget=args.budget))
    for number, (name, (start, end)) in enumerate(zip(names, spans, strict=True), 1):
        print(f"S{number} = {name}: " + (f"tokens {start} to {end - 1}" if end - start > 1 else f"token {start}"))
    if args.png is not None:
        print(f"-> {save_mask_png(mask, args.png, spans, names=names, title=title)}")
    return 0


def trunk_mask(
    config: Mapping[str, Any],
    latent_shape: tuple[int, int, int],
    part: str,
    *,
    batch: int = 1,
    keep_ks: Sequence[int] | None = None,
) -> TrunkMask:
    """Run the modules of a FlexTok config up to the packer of `part`, which is one of `TRUNKS`.

    `latent_shape` is `(channels, height, width)` of the latents of one image; `keep_ks` has one entry for all samples,
    or `batch`. Whatever the config names is built, so one from elsewhere has to be sanitised before.
    """
    import torch

    from flextok.cli.module_table import PARTS
    from flextok.model.preprocessors.dropout_sampler import DropoutSampler
    from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
    from flextok.model.preprocessors.nested_dropout_seq_packer import NestedDropoutSequencePacker

    if batch < 1:
        raise ValueError(f"--batch {batch}: valid is 1 sample or more")
    modules = {name: _build(settings) for name, settings in config[part].get("module_dict", {}).items()}
    packer_name = next((name for name, module in modules.items() if isinstance(module, BlockWiseSequencePacker)), None)
    if packer_name is None:
        raise ValueError(f"the {part} has no packer (BlockWiseSequencePacker), so no module states its mask")
    eval_keys = [module.eval_keep_k_read_key for module in modules.values() if hasattr(module, "eval_keep_k_read_key")]
    samplers = [module for module in modules.values() if isinstance(module, DropoutSampler)]
    if keep_ks is not None and not (eval_keys or samplers):
        raise ValueError(f"--keep-k: the {part} has no nested dropout, all its registers are kept")
    kept = None if keep_ks is None else _one_per_sample(keep_ks, batch)

    latents_key = config["flow_matching_noise_module"]["clean_images_read_key"]
    data: dict[str, Any] = {latents_key: [torch.empty(1, *latent_shape, device="meta") for _ in range(batch)]}
    if kept is not None:
        data |= dict.fromkeys(eval_keys, kept)
    packer = modules[packer_name]
    # A materialised mask would have a shape and no values.
    packer.return_materialized_mask = False
    if isinstance(packer, NestedDropoutSequencePacker):
        # Evaluation leaves hidden registers out whatever was chosen; training, which this shows, may hide them.
        packer.shortens_rows = packer.drop_masked
    with torch.no_grad():
        for before in PARTS[: PARTS.index(part)]:
            data = _build(config[before])(data)
        for module in modules.values():
            data = module(data)
            if kept is not None and module in samplers:
                # In training it draws them.
                data[module.sampled_keep_k_write_key] = kept
            if module is packer:
                break
    return TrunkMask(packer_name, packer.input_list_read_keys, data[packer.block_mask_write_key], kept)


def segments_of(found: TrunkMask) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and span `(start, end)` of every part of the row: sub-sequences, registers split at `keep_k`, padding."""
    layout, start = found.layout, 0
    for sample, lengths in enumerate(layout.lengths):
        prefix = f"sample {sample + 1} " if len(layout.lengths) > 1 else ""
        parts = [(_plain_name(key), n) for key, n in zip(found.subsequences, lengths, strict=True)]
        if found.keep_ks is not None:
            kept = min(found.keep_ks[sample], lengths[-1])
            parts[-1:] = [("registers kept", kept), (_name_of_dropped(layout, sample), lengths[-1] - kept)]
        for name, num_tokens in parts:
            if num_tokens:
                yield prefix + name, (start, start + num_tokens)
            start += num_tokens
    if start < layout.row_length:
        yield "padding", (start, layout.row_length)


def _build(settings: Mapping[str, Any]) -> Any:
    import hydra.utils
    import torch

    # Only while it is built: modules also make small tensors whose values they look at.
    with torch.device("meta"):
        return hydra.utils.instantiate(settings).eval()


def _one_per_sample(keep_ks: Sequence[int], batch: int) -> list[int]:
    if len(keep_ks) not in (1, batch):
        raise ValueError(
            f"--keep-k has {len(keep_ks)} numbers for a batch of {batch}; valid: one for all samples, or one for each"
        )
    return [*keep_ks] * (batch if len(keep_ks) == 1 else 1)


def _name_of_dropped(layout: "SequenceLayout", sample: int) -> str:
    if layout.keep_last is not None:
        return "registers dropped"
    # Nothing is hidden: a learned token took the place of each, and of equal tokens one may stand for all.
    count = 1 if layout.last_counts is None else layout.last_counts[sample]
    return f"mask token, counts {count} times" if count > 1 else "mask tokens"


def _plain_name(key: str) -> str:
    return next((name for stem, name in _PLAIN_NAMES.items() if stem in key), key)


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(
            f"{text!r}: valid are whole numbers from 0 with commas between them, as in 4,9"
        )
    return [int(word) for word in words]
