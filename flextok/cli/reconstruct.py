"""Show what a tokenizer makes of one image: it and its reconstructions from more and more tokens, with labels.

  flextok reconstruct cat.jpg --checkpoint runs/digits/2025-01-31_12-00-00
  flextok reconstruct cat.jpg cat_tokens.png --checkpoint my_tokenizer --keep-k 1 4 16 --guidance-scale 7.5

For each number of tokens it prints the bits they take and the PSNR against the central square of the image, in the
size that the model reads.
"""

import argparse
import math
from pathlib import Path

from flextok.cli.loaded_model import (
    add_model_arguments,
    add_sampling_arguments,
    check_at_least,
    image_size_of,
    load_model,
    sampling_options,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a JPEG, PNG or WebP image")
    parser.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", help="the PNG to write; default: <FILE>_reconstructed.png, here"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--keep-k", metavar="K", type=int, nargs="+", help="numbers of tokens (default: powers of two, and all)"
    )
    add_sampling_arguments(parser)
    parser.add_argument("--image-size", type=int, help="pixels along one side; default: what the model was made for")


def run(args: argparse.Namespace) -> int:
    import torch

    from flextok.data.transforms import read_image, resize_shorter_center_crop, to_tensor
    from flextok.evaluation.grid import tokens_label
    from flextok.evaluation.reconstruction import psnr, to_unit_range
    from flextok.model.keep_k import default_keep_ks
    from flextok.pictures import image_grid, save_image
    from flextok.reconstruct import decode_tokens, encode_images

    check_at_least(args, steps=1, seed=0)
    out = args.out or Path(f"{args.file.stem}_reconstructed.png")
    if not args.file.is_file():
        raise ValueError(f"FILE: {args.file} is no file")
    if out.suffix.lower() != ".png" or out.resolve() == args.file.resolve():
        raise ValueError(f"OUT: {out}; valid: the name of a .png file other than FILE")
    picture = read_image(args.file, name=f"FILE: {args.file}")
    model = load_model(args)
    keep_ks = sorted(set(args.keep_k or default_keep_ks(model.num_registers)))
    if not 1 <= keep_ks[0] <= keep_ks[-1] <= model.num_registers:
        raise ValueError(f"--keep-k {keep_ks}: valid are 1 to {model.num_registers} for this model")
    size = image_size_of(model, args.image_size)
    image = to_tensor(resize_shorter_center_crop(picture, size))[None]
    bits = math.log2(model.regularizer.codebook_size)
    rows = {f"original\n{size} x {size} pixels": image}
    print("tokens      bits  PSNR/dB")
    with torch.no_grad():
        encoded = encode_images(model, image.to(model.device), [args.file.name], seed=args.seed)
        for keep_k in keep_ks:
            decoded = decode_tokens(model, encoded, keep_k=keep_k, seed=args.seed, **sampling_options(args)).cpu()
            (quality,) = psnr(to_unit_range(decoded), to_unit_range(image))
            rows[f"{tokens_label(keep_k)}\n{keep_k * bits:.0f} bits, {quality:.1f} dB"] = decoded
            print(f"{keep_k:6d}  {keep_k * bits:8.1f}  {quality:7.2f}")
    save_image(image_grid(rows), out)
    print(f"-> {out}")
    return 0
