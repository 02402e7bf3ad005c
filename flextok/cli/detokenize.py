"""Turn the tokens that `flextok tokenize` wrote back into images, all of them or the first K of each.

  flextok detokenize my_tokens my_images --checkpoint runs/digits/2025-01-31_12-00-00
  flextok detokenize my_tokens my_images --checkpoint my_tokenizer --keep-k 8 --steps 10 --guidance-scale 7.5

The image `cats/1.jpg` becomes `cats/1.jpg.png`, a square. The noise that decoding starts from belongs to each image and
the seed. After an interruption the same command goes on with the images that are not there yet.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from flextok.cli.loaded_model import (
    add_model_arguments,
    add_sampling_arguments,
    check_at_least,
    describe_model,
    load_model,
    sampling_options,
)

if TYPE_CHECKING:
    from flextok.data.token_shards import TokenSample, TokenShards

SETTINGS = "detokenize.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder that `flextok tokenize` wrote")
    parser.add_argument("destination", metavar="DESTINATION", type=Path, help="folder to write into, or to go on with")
    add_model_arguments(parser)
    parser.add_argument("--keep-k", metavar="K", type=int, help="tokens to use of each image (default: all stored)")
    add_sampling_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=32, help="images decoded at a time (default: 32)")
    parser.add_argument(
        "--other-model", action="store_true", help="go on although another model made the tokens: only to look at it"
    )


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from flextok.data.splits import hash_of_names
    from flextok.data.token_shards import TokenShards

    check_at_least(args, keep_k=1, steps=1, batch_size=1, seed=0)
    tokens = TokenShards(args.source)
    stored = tokens.metadata["keep_k"]
    keep_k = stored if args.keep_k is None else args.keep_k
    if keep_k > stored:
        raise ValueError(f"--keep-k is {keep_k}: SOURCE holds {stored} tokens of each image; valid: 1 to {stored}")
    model = load_model(args)
    made_by = describe_model(model)
    if made_by != tokens.metadata["model"] and not args.other_model:
        raise ValueError(_other_model(made_by, tokens.metadata["model"], args))
    options = sampling_options(args)
    shards = hash_of_names(shard["sha256"] for shard in tokens.shards)
    settings = {"tokens": shards, "model": made_by, "keep_k": keep_k, "seed": args.seed, **options}
    _open_folder(args.destination, settings)
    size = tokens.metadata["image_size"] // model.downsample_factor
    with tqdm(total=len(tokens), desc="detokenize", unit="image") as bar:
        for samples in _batches(tokens, args.batch_size):
            paths = [_path(args.destination, sample["key"]) for sample in samples]
            # All or none of a batch, so that an image is the same whether it was interrupted or not.
            if not all(path.exists() for path in paths):
                images = _decode(model, samples, keep_k=keep_k, size=size, seed=args.seed, **options)
                _save(images, paths)
            bar.update(len(samples))
    print(f"{args.destination}: {len(tokens)} images from at most {keep_k} tokens each")
    return 0


def _decode(model: Any, samples: "Sequence[TokenSample]", *, keep_k: int, size: int, seed: int, **options: Any) -> Any:
    """Images `[batch, 3, height, width]` from latents of `size`; the noise is that of `decode_tokens`."""
    import torch

    from flextok.seeding import image_generators

    with torch.no_grad():
        return model.detokenize(
            [sample["ids"][None, :keep_k] for sample in samples],
            vae_image_sizes=size,
            generator=image_generators(seed, [sample["key"] for sample in samples], stream="decode"),
            verbose=False,
            **options,
        )


def _save(images: Any, paths: Sequence[Path]) -> None:
    from flextok.data.transforms import to_pil
    from flextok.pictures import save_image

    for image, path in zip(images, paths, strict=True):
        if not path.exists():
            save_image(to_pil(image), path)


def _batches(tokens: "TokenShards", batch_size: int) -> "Iterator[list[TokenSample]]":
    for start in range(0, len(tokens), batch_size):
        yield [tokens[number] for number in range(start, min(start + batch_size, len(tokens)))]


def _path(folder: Path, key: str) -> Path:
    path = PurePosixPath(key)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"SOURCE: the key {key!r} leads out of DESTINATION; valid: relative paths without '..'")
    return folder / f"{key}.png"


def _open_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder or go on with it: images of two settings never lie in one."""
    from flextok.cli.shard_folder import check_same
    from flextok.utils.checkpoint import atomic_path

    path = folder / SETTINGS
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); write into another folder") from error
        check_same(stored, settings, where=f"DESTINATION: {folder} holds images")
        for leftover in folder.rglob(".*.png.*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink()
        return
    if folder.exists() and (not folder.is_dir() or any(file.suffix != ".tmp" for file in folder.iterdir())):
        raise ValueError(
            f"DESTINATION: {folder} exists and was not written by `flextok detokenize`; valid: a new or an empty folder"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _other_model(ours: Mapping[str, Any], theirs: Mapping[str, Any], args: argparse.Namespace) -> str:
    return (
        f"--checkpoint={args.checkpoint} is not the model that made the tokens in {args.source}: its weights have the "
        f"hash {ours['weights_sha256'][:12]}, those of the tokens {theirs['weights_sha256'][:12]}; valid: that model "
        "with the same --weights, or --other-model to decode them all the same"
    )
