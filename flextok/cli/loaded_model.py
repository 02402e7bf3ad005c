"""The model that the commands on tokens work with: their options for it, and what they must know of it."""

import argparse
from pathlib import Path
from typing import Any

# How `FlexTok.decode` is asked for images; the names are its own.
_SAMPLING = ("guidance_scale", "perform_norm_guidance")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--checkpoint`, `--weights`, `--device` and `--seed`."""
    parser.add_argument(
        "--checkpoint",
        metavar="MODEL",
        required=True,
        help="a run folder, a .ckpt in one, an exported folder, a .safetensors file, latest, or embedded:photos",
    )
    parser.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="of a run: averaged (default) or of the last step"
    )
    parser.add_argument("--device", default="auto", help="auto (the first accelerator, else the CPU), cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="for what is drawn for each image (default: 0)")


def add_sampling_arguments(parser: argparse.ArgumentParser, when: str = "") -> None:
    """`--steps`, `--guidance-scale` and `--perform-norm-guidance`; `when` begins what is said of each."""
    parser.add_argument("--steps", type=int, default=25, help=f"{when}steps of the decoder (default: 25)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help=f"{when}1.0, the default, is none")
    parser.add_argument(
        "--perform-norm-guidance", action="store_true", help=f"{when}adaptive projected guidance, not the plain one"
    )


def load_model(args: argparse.Namespace) -> Any:
    """The FlexTok that `--checkpoint` means, on its device, in eval mode.

    Raises:
        ValueError: There is no such model or device.
    """
    from flextok.evaluation.device import pick_device
    from flextok.evaluation.source import find_source

    device = pick_device(args.device, field="--device")
    model, _ = find_source(args.checkpoint, runs=Path("runs")).load(weights=args.weights)
    return model.to(device).eval()


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_sampling_arguments` as arguments of `FlexTok.decode`."""
    return {"timesteps": args.steps} | {name: getattr(args, name) for name in _SAMPLING}


def describe_model(model: Any) -> dict[str, Any]:
    """What tells this model's tokens from those of another."""
    from flextok.provenance import weights_sha256

    return {
        "weights_sha256": weights_sha256(model),
        "num_registers": model.num_registers,
        "codebook_size": model.regularizer.codebook_size,
        "levels": list(model.regularizer.levels),
    }


def image_size_of(model: Any, asked: int | None) -> int:
    """Pixels along one side of the images that a model reads: as asked, or those that fill its grid of patches.

    Raises:
        ValueError: The model cannot read that size, or does not say which it can.
    """
    from flextok.model.preprocessors.patching import PatchEmbedder
    from flextok.model.utils.posembs import PositionalEmbedding

    modules = list(model.encoder.module_dict.values())
    patch = next((max(module.patch_sizes) for module in modules if isinstance(module, PatchEmbedder)), 1)
    grids = [module.max_sizes for module in modules if isinstance(module, PositionalEmbedding)]
    grid = next((min(sizes) for sizes in grids if len(sizes) == 2), None)
    step = patch * model.downsample_factor
    if asked is None:
        if grid is None:
            raise ValueError("--image-size is needed: this model does not say which images it was made for")
        return int(grid * step)
    if asked < 1 or asked % step:
        raise ValueError(f"--image-size is {asked}: valid are multiples of {step} for this model")
    return asked


def check_at_least(args: argparse.Namespace, **lowest: int) -> None:
    """Raise ValueError naming the first of these options that is given and below its lowest value."""
    for name, value in lowest.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise ValueError(f"--{name.replace('_', '-')} is {given}: it must be at least {value}")
