"""Turn a folder of images, or tar files of them, into shards that training can stream.

  flextok prepare my_images my_shards --image-size 256
  flextok prepare 'tars/*.tar' my_shards --workers 16

Without --image-size the files stay as they are. Train with `data=webdataset data.root=DESTINATION`. After an
interruption the same command goes on: at most one shard is done again.
"""

import argparse
import os
from hashlib import blake2b
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder of images or .tar files, at any depth; or a pattern")
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="folder to write into, or to go on with")
    parser.add_argument("--image-size", type=int, help="shrink images to this shorter side, in pixels, as JPEG")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG files that --image-size makes, 1 to 100")
    parser.add_argument("--shard-size", type=int, default=1000, help="images per shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default: one per core")
    parser.add_argument("--val-fraction", type=float, default=0.05, help="part of the images for choosing settings")
    parser.add_argument("--test-fraction", type=float, default=0.05, help="part of the images for results")
    parser.add_argument("--max-bad-fraction", type=float, default=0.1, help="part that may be unreadable")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from flextok.cli.image_sources import open_source
    from flextok.cli.image_writer import TAR, BadImages, fill_split
    from flextok.cli.shard_folder import ShardFolder
    from flextok.data.image_files import split_files
    from flextok.data.tar_shards import IMAGES

    _check(args)
    source = open_source(args.source)
    splits = split_files(source.keys, val_fraction=args.val_fraction, test_fraction=args.test_fraction)
    settings = {
        "image_size": args.image_size,
        "quality": None if args.image_size is None else args.quality,
        "val_fraction": args.val_fraction,
        "test_fraction": args.test_fraction,
    }
    folder = ShardFolder(args.destination, settings, IMAGES, argument="DESTINATION")
    bad = BadImages(len(source.keys), max_fraction=args.max_bad_fraction)
    for name, numbers in splits.items():
        keys = "\0".join(source.keys[number] for number in numbers)
        with tqdm(total=len(numbers), desc=name, unit="image") as bar:
            fill_split(
                folder,
                name,
                source,
                numbers,
                TAR,
                fingerprint=blake2b(keys.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest(),
                shard_size=args.shard_size,
                image_size=args.image_size,
                quality=args.quality,
                num_workers=args.workers,
                bad=bad,
                report=bar.update,
            )
    print(f"{args.destination}: {len(source.keys) - bad.count} images, {bad.count} unreadable ones left out")
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, lowest, highest in (
        ("image_size", 1, None),
        ("quality", 1, 100),
        ("shard_size", 1, None),
        ("workers", 0, None),
        ("max_bad_fraction", 0, 1),
    ):
        value = getattr(args, name)
        if value is not None and (value < lowest or (highest is not None and value > highest)):
            valid = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be {valid}")
    if args.destination.resolve().is_relative_to(Path(args.source).expanduser().resolve()):
        raise ValueError(f"DESTINATION: {args.destination} lies in SOURCE; valid: a folder elsewhere")
