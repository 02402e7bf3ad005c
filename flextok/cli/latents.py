"""Encode a data set with the VAE of a config once, so that training need not do it in every step.

  flextok latents OUT_DIR data=image_folder data.root=my_images vae=kl latent.path=my_vae
  flextok latents OUT_DIR data=photos data.image_size=64 --variants 8 --dtype fp32
  flextok latents OUT_DIR experiment=imagenet_d12_d12 data.root=my_images latent.path=my_vae --features my_dinov2

The overrides are those of train.py. Train from the folder with `data=latents data.root=OUT_DIR` and the same `vae`,
`latent` and `data.image_size`. After an interruption the same command goes on: at most one shard is done again.
"""

import argparse
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# What changes how fast the samples are made, not what they are.
_SPEED_SETTINGS = ("batch_size", "eval_batch_size", "num_workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write into, or to go on with")
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="overrides of the training config")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="number format of the latents")
    parser.add_argument(
        "--variants", type=int, default=1, help="random crops or flips of each training image, as training makes them"
    )
    parser.add_argument(
        "--features", metavar="TEACHER", help="also store those of a DINOv2 (folder or hub name), for REPA"
    )
    parser.add_argument(
        "--feature-size", type=int, help="patches along one side; default: those of the config's model (size.grid)"
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="default: all three")
    parser.add_argument("--shard-size", type=int, default=1024, help="images per file, and at most lost if killed")
    parser.add_argument("--batch-size", type=int, default=32, help="images the VAE encodes at a time")
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")


def run(args: argparse.Namespace) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from flextok.config import describe_error

    for name in ("variants", "shard_size", "batch_size", "feature_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if args.feature_size is not None and args.features is None:
        raise ValueError(f"--feature-size={args.feature_size} has no --features it could be the size of")
    try:
        _encode(args)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(describe_error(error)) from error
    print(f"{args.out_dir}: {', '.join(args.splits)}")
    return 0


def _encode(args: argparse.Namespace) -> None:
    import hydra.utils
    import torch
    from omegaconf import OmegaConf
    from tqdm import tqdm

    from flextok.cli.latent_writer import encode_split
    from flextok.cli.shard_folder import ShardFolder
    from flextok.config import compose
    from flextok.data.latent_shards import LATENTS
    from flextok.data.latents import LatentsDataModule
    from flextok.evaluation.device import pick_device
    from flextok.provenance import weights_sha256
    from flextok.training.repa import FrozenTeacher

    config = compose(args.overrides)
    vae, latent, data = (
        OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        for node in (config.model.vae, config.latent, config.data)
    )
    assert isinstance(vae, dict)
    assert isinstance(data, dict)
    images = hydra.utils.instantiate(data, _convert_="all")
    if isinstance(images, LatentsDataModule):
        raise ValueError("data=latents are latents already; valid: images, such as data=image_folder")
    images.setup("predict")
    model = hydra.utils.instantiate(vae, _convert_="all")
    model.freeze()
    model.to(pick_device(args.device, field="--device")).eval()
    settings: dict[str, Any] = {
        "vae": {name: value for name, value in vae.items() if name != "in_memory"},
        "vae_weights": weights_sha256(model),
        "latent": latent,
        "data": {name: value for name, value in data.items() if name not in _SPEED_SETTINGS},
        "seed": config.seed,
        "dtype": args.dtype,
    }
    teacher: FrozenTeacher | None = None
    if args.features is not None:
        size = args.feature_size or config.size.grid
        teacher = FrozenTeacher.load(args.features, field="--features")
        settings["features"] = {"teacher": args.features, "weights": weights_sha256(teacher.model), "size": size}

    def encode(batch: Any, keys: list[str], variants: list[int]) -> dict[str, Any]:
        content = {"latents": encode_images(model, batch, keys, variants, seed=config.seed)}
        if teacher is not None:
            content["features"] = teacher(batch.to(model.device), (size, size))
        return content

    folder = ShardFolder(args.out_dir, settings, LATENTS, argument="OUT_DIR")
    for split in args.splits:
        dataset = images.datasets[split]
        with tqdm(total=len(dataset), desc=split, unit="image") as bar:
            encode_split(
                folder,
                split,
                dataset,
                encode,
                variants=args.variants if split == "train" else 1,
                shard_size=args.shard_size,
                dtype=getattr(torch, DTYPES[args.dtype]),
                batch_size=args.batch_size,
                num_workers=images.num_workers,
                report=bar.update,
            )


def encode_images(vae: Any, images: Any, keys: list[str], variants: list[int], *, seed: int) -> Any:
    """Latents `[batch, c, h, w]` of images `[batch, 3, height, width]`.

    What the VAE draws depends on the seed, the key of an image and its variant alone.
    """
    import torch

    from flextok.model.data_dict import RNG_KEY
    from flextok.seeding import image_generator

    generators = [
        image_generator(seed, key, stream=f"latents {variant}") for key, variant in zip(keys, variants, strict=True)
    ]
    with torch.no_grad():
        data = vae.encode({vae.images_read_key: list(images.to(vae.device).split(1)), RNG_KEY: generators})
    return torch.cat(list(data[vae.vae_latents_write_key]))
