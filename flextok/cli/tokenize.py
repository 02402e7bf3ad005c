"""Write the tokens of images, for a model that learns to write tokens, or to keep the images in little room.

  flextok tokenize my_images my_tokens --checkpoint runs/digits/2025-01-31_12-00-00
  flextok tokenize 'tars/*.tar' my_tokens --checkpoint my_tokenizer --keep-k 32 --format webdataset
  flextok tokenize my_images my_tokens --checkpoint my_tokenizer --target psnr=24
  flextok tokenize my_images my_tokens --checkpoint my_tokenizer --target lpips=0.2 --target-weights alexnet.pth

Images are turned upright, cut to their central square and resized to what the model reads. DESTINATION then holds
shards of tokens and index.json, which says how they were made; read them with `flextok.data.token_shards.TokenShards`,
turn them back into images with `flextok detokenize`. After an interruption the same command goes on: at most one shard
is done again.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from flextok.cli.loaded_model import (
    add_model_arguments,
    add_sampling_arguments,
    check_at_least,
    describe_model,
    image_size_of,
    load_model,
    sampling_options,
)
from flextok.cli.token_target import add_target_arguments, describe_target, load_networks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of images or .tar files, at any depth; or a pattern")
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="folder to write into, or to go on with")
    add_model_arguments(parser)
    parser.add_argument("--keep-k", metavar="N", type=int, help="tokens of each image (default: all of them)")
    add_target_arguments(parser)
    add_sampling_arguments(parser, "for --target: ")
    parser.add_argument(
        "--format", choices=("parquet", "webdataset"), default="parquet", help="of the shards (default: parquet)"
    )
    parser.add_argument("--image-size", type=int, help="pixels along one side; default: what the model was made for")
    parser.add_argument("--shard-size", type=int, default=1000, help="images per shard, and at most lost if killed")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at a time (default: 32)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="that read; default: one per core")
    parser.add_argument("--max-bad-fraction", type=float, default=0.1, help="part that may be unreadable")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from flextok.cli.image_sources import open_source
    from flextok.cli.image_writer import BadImages
    from flextok.cli.shard_folder import ShardFolder
    from flextok.cli.token_writer import write_tokens
    from flextok.data.token_files import storage_of
    from flextok.data.token_shards import TOKENS, TokenShards

    check_at_least(args, keep_k=1, steps=1, shard_size=1, batch_size=1, workers=0, seed=0)
    if not 0 <= args.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction is {args.max_bad_fraction}: it must be between 0 and 1")
    if args.destination.resolve().is_relative_to(Path(args.source).expanduser().resolve()):
        raise ValueError(f"DESTINATION: {args.destination} lies in SOURCE; valid: a folder elsewhere")
    storage = storage_of(args.format)
    source = open_source(args.source)
    model = load_model(args)
    keep_k = model.num_registers if args.keep_k is None else args.keep_k
    if keep_k > model.num_registers:
        raise ValueError(f"--keep-k is {keep_k}: this model has {model.num_registers} tokens per image")
    image_size = image_size_of(model, args.image_size)
    networks, target = None, None
    if args.target is not None:
        networks = load_networks(args.target, args.target_weights, model.device)
        target = {**describe_target(args.target, networks), **sampling_options(args)}
    elif args.target_weights is not None:
        raise ValueError(f"--target-weights={args.target_weights}: without --target it has no meaning; leave it out")
    settings = {
        "model": describe_model(model),
        "image_size": image_size,
        "preprocessing": "upright RGB on white, central square, bicubic",
        "keep_k": keep_k,
        "target": target,
        "seed": args.seed,
        "format": args.format,
    }
    folder = ShardFolder(args.destination, settings, TOKENS, argument="DESTINATION")
    bad = BadImages(len(source.keys), max_fraction=args.max_bad_fraction)
    with tqdm(total=len(source.keys), desc="tokenize", unit="image") as bar:
        write_tokens(
            folder,
            source,
            lambda images, keys: _encode(model, images, keys, args, networks, keep_k=keep_k),
            storage,
            image_size=image_size,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            num_workers=args.workers,
            bad=bad,
            report=bar.update,
        )
    tokens = TokenShards(args.destination)
    lengths = [len(tokens[number]["ids"]) for number in range(len(tokens))]
    print(f"{args.destination}: {len(lengths)} images, {bad.count} unreadable ones left out")
    if args.target is not None and lengths:
        mean = sum(lengths) / len(lengths)
        print(f"{mean:.1f} tokens per image, {lengths.count(keep_k)} of the images take all {keep_k}")
    return 0


def _encode(
    model: Any, images: Any, keys: list[str], args: argparse.Namespace, networks: Any, *, keep_k: int
) -> list[Any]:
    """The ids of each image of `[batch, 3, height, width]`: the first `keep_k`, or as many of them as it needs."""
    import torch

    from flextok.evaluation.shortest import tokens_needed
    from flextok.reconstruct import encode_images

    images = images.to(model.device)
    lengths: list[int | None] = [keep_k] * len(keys)
    with torch.no_grad():
        encoded = encode_images(model, images, keys, seed=args.seed)
    if args.target is not None:
        options = {"seed": args.seed, "networks": networks, **sampling_options(args)}
        lengths = tokens_needed(model, images, encoded, args.target, longest=keep_k, **options)
    return [ids[0, : length or keep_k] for ids, length in zip(encoded.tokens, lengths, strict=True)]
