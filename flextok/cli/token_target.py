"""What `flextok tokenize --target` may ask for, and the network that measures it."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from flextok.evaluation.features import FeatureExtractor
    from flextok.evaluation.networks import Networks
    from flextok.evaluation.targets import Target

# Side of the images that DINOv2 looks at, as its authors evaluate it.
DINOV2_SIZE = 224
# Names of networks, and what weights they have.
NETWORKS = {
    "lpips": "alexnet-owt-7be5be79.pth of torchvision",
    "lpips_vgg": "vgg16-397923af.pth of torchvision",
    "inception": "inception-2015-12-05.pt, which is TorchScript",
    "dinov2": "a folder or a hub name such as facebook/dinov2-large",
}


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """`--target` and `--target-weights`."""
    parser.add_argument(
        "--target",
        metavar="METRIC=VALUE",
        type=_target,
        help="store of each image as few of them as reconstruct it this well: psnr=24, ssim=0.9; or so closely, by a "
        f"network: {', '.join(f'{name}=NUMBER' for name in NETWORKS)}",
    )
    parser.add_argument(
        "--target-weights",
        metavar="PATH",
        help="of that network: " + "; ".join(f"for {name} {weights}" for name, weights in NETWORKS.items()),
    )


def load_networks(target: "Target", weights: str | None, device: "torch.device") -> "Networks":
    """The network that a target needs, if it needs one.

    Raises:
        ValueError: `weights` is missing, does not exist, or holds something else; or there is no need of it.
    """
    from flextok.evaluation.features import MissingWeightsError
    from flextok.evaluation.lpips import LPIPS
    from flextok.evaluation.networks import Networks

    name = target.metric
    if not target.needs_network:
        if weights is not None:
            raise ValueError(f"--target-weights={weights}: {name} is measured without a network; leave it out")
        return Networks()
    if weights is None:
        raise ValueError(f"--target {target} needs --target-weights: {NETWORKS[name]}")
    try:
        if name.startswith("lpips"):
            lpips = LPIPS(network="vgg" if name == "lpips_vgg" else "alex", path=weights, heads=None)
            return Networks(distances={name: lpips.to(device)})
        extractor = _extractor(name, weights)
    except MissingWeightsError as error:
        raise ValueError(f"--target-weights={weights}: {error}, or name another place") from error
    extractor.to(device)
    return Networks(extractors={name: extractor})


def describe_target(target: "Target", networks: "Networks") -> dict[str, Any]:
    """What decides which images meet it, in plain types."""
    from flextok.evaluation.features import sha256_of_module

    about: dict[str, Any] = {target.metric: target.value}
    if target.metric in networks.distances:
        about["network"] = {"sha256": sha256_of_module(networks.distances[target.metric])}
    elif target.metric in networks.extractors:
        extractor = networks.extractors[target.metric]
        about["network"] = {"sha256": extractor.sha256, "transform": extractor.transform, "distance": "1 - cosine"}
    return about


def _extractor(name: str, weights: str) -> "FeatureExtractor":
    from flextok.evaluation.features import Dinov2Features, InceptionFeatures

    if name == "inception":
        return InceptionFeatures(path=weights)
    return Dinov2Features(path=weights, image_size=DINOV2_SIZE)


def _target(text: str) -> "Target":
    from flextok.evaluation.targets import Target

    try:
        return Target.parse(text, networks=NETWORKS)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
