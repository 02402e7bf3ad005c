"""Learn the projections of HashAttention from a model's own queries and keys.

  flextok train-hash my_lm --text my_text.txt --out my_hash
  flextok train-hash --checkpoint embedded:photos --images my_images --out my_hash

Of a language model the first form, of a tokenizer's decoder the second. FOLDER gets hash_BITS.safetensors (the
hat_weight_file of HashAttentionTopKMasker), and recall.json and recall.png: how many of the keys with the largest
logits are found on sequences that were held out, beside random projections. After an interruption the same command
goes on.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextok.cli.setting_options import add_setting_options, read_settings
from flextok.training.hash_settings import HashSettings

if TYPE_CHECKING:
    from flextok.training.hash_data import Observed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a language model: folder, name on the hub, embedded:"
    )
    parser.add_argument("--text", metavar="FILE", type=Path, help="that the language model reads")
    parser.add_argument("--context", type=int, help="tokens of a window of it (default: the model's, at most 512)")
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="a tokenizer: a run folder, an exported folder, embedded:photos, ..."
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged (default) or of the last step"
    )
    parser.add_argument("--images", metavar="SOURCE", help="that the tokenizer reads: a folder, or tar files")
    parser.add_argument("--part", choices=("decoder", "encoder"), default="decoder", help="of the tokenizer (decoder)")
    parser.add_argument("--sampler-steps", type=int, default=4, help="of the decoder, for each image (%(default)s)")
    parser.add_argument("--sequences", type=int, default=64, help="windows, or images, to learn from (%(default)s)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="to write into, or to go on with")
    parser.add_argument("--bits", metavar="N", nargs="+", type=int, default=(16, 32, 64), help="(16 32 64)")
    parser.add_argument(
        "--densities", metavar="D", nargs="+", type=float, default=(0.05, 0.1, 0.2, 0.4), help="(0.05 0.1 0.2 0.4)"
    )
    add_setting_options(parser, HashSettings)
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next (100)")
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")


def run(args: argparse.Namespace) -> int:
    from flextok.cli.loaded_model import check_at_least
    from flextok.evaluation.device import pick_device
    from flextok.training.hash_recall import format_recall
    from flextok.training.hash_training import train_hash

    check_at_least(args, save_every=1, sequences=2, sampler_steps=1, context=4)
    settings = read_settings(args, HashSettings)
    if (args.model is None) == (args.checkpoint is None):
        raise ValueError("MODEL, --checkpoint: one of the two is needed, a language model or a tokenizer")
    observed = _from_text(args) if args.model else _from_images(args)
    report = train_hash(
        observed,
        args.out,
        settings,
        bits=args.bits,
        densities=args.densities,
        device=pick_device(args.device, field="--device"),
        save_every=args.save_every,
    )
    print(f"{format_recall(report)}\n{args.out}: hash_*.safetensors, recall.json, recall.png")
    return 0


def _from_text(args: argparse.Namespace) -> "Observed":
    import torch

    from flextok.evaluation.device import pick_device
    from flextok.fusion.language_model import load_language_model
    from flextok.training.hash_data import observe_language_model

    if args.text is None:
        raise ValueError("--text is needed: what the language model reads")
    text = args.text.read_text(encoding="utf-8")
    model, tokenizer = load_language_model(args.model, device=pick_device(args.device, field="--device"))
    longest = min(512, getattr(model.config.get_text_config(), "max_position_embeddings", 512))
    ids: Any = tokenizer(text, verbose=False)["input_ids"]
    return observe_language_model(model, torch.tensor(ids), context=args.context or longest, windows=args.sequences)


def _from_images(args: argparse.Namespace) -> "Observed":
    import torch
    from tqdm import tqdm

    from flextok.cli.image_sources import open_source
    from flextok.cli.loaded_model import image_size_of, load_model
    from flextok.data.transforms import read_image, resize_shorter_center_crop, to_tensor
    from flextok.reconstruct import decode_tokens, encode_images
    from flextok.training.hash_data import observed_trunk

    if args.images is None:
        raise ValueError("--images is needed: what the tokenizer reads")
    source = open_source(args.images)
    model = load_model(args)
    size = image_size_of(model, None)
    keys = source.keys[: args.sequences]
    with torch.no_grad(), observed_trunk(getattr(model, args.part)) as observed:
        for number, key in enumerate(tqdm(keys, unit="image")):
            picture = read_image(source.read(number), name=key)
            image = to_tensor(resize_shorter_center_crop(picture, size))[None].to(model.device)
            encoded = encode_images(model, image, [key], seed=args.seed)
            if args.part == "decoder":
                decode_tokens(
                    model,
                    encoded,
                    keep_k=model.num_registers,
                    seed=args.seed,
                    timesteps=args.sampler_steps,
                )
    return observed
