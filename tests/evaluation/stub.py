"""A tokenizer with the interface of FlexTok and no network: four tokens, one per quadrant of the image."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from torch import nn

from flextok.evaluation.encoding import encode_split
from flextok.evaluation.grid import make_grid
from flextok.evaluation.judges import NO_JUDGES
from flextok.evaluation.lengths import make_searches
from flextok.evaluation.points import PointStore
from flextok.evaluation.settings import EvaluationSettings, resolve_keep_ks
from flextok.evaluation.sweep import run_points

SETTINGS = {
    "num_images": None,
    "split": "test",
    "keep_ks": None,
    "steps": 2,
    "sampler": "euler",
    "timestep_shift": 1.0,
    "guidance_scale": 1.0,
    "perform_norm_guidance": False,
    "guidance_interval": [0.0, 1.0],
    "guidance_every": 1,
    "weights": "ema",
    "batch_size": 4,
    "seed": 0,
    "grid_images": 3,
    "forms": None,
    "backends": None,
    "sparse": None,
    "budgets": [0.1, 1.0],
    "targets": None,
    "resume": True,
    "device": "cpu",
    "features": {},
    "distances": {},
    "kid_subsets": 10,
    "kid_subset_size": 1000,
    "reference_cache": "cache/references",
    "import_references": None,
    "export_references": None,
}


class StubVAE:
    images_read_key = "rgb"
    vae_latents_write_key = "vae_latents"
    vae_latents_read_key = "vae_latents_reconst"
    images_reconst_write_key = "rgb_reconst"

    def decode(self, data):
        data[self.images_reconst_write_key] = list(data[self.vae_latents_read_key])
        return data


class StubTokenizer(nn.Module):
    """A token is the mean colour of a quadrant in steps of 1/2; dropped quadrants become noise."""

    num_registers = 4
    token_write_key, quants_write_key, image_write_key = "tokens", "quants", "rgb_reconst"
    eval_keep_k_key = "eval_keep_k"
    regularizer = SimpleNamespace(codebook_size=125, levels=[5, 5, 5])

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.vae = StubVAE()

    def encode(self, data):
        data["vae_latents"] = list(data["rgb"])
        means = [nn.functional.adaptive_avg_pool2d(image, 2).flatten(2).mT for image in data["rgb"]]
        digits = [((mean + 1) * 2).round().long() for mean in means]
        data["tokens"] = [(d * torch.tensor([1, 5, 25])).sum(-1) for d in digits]
        data["quants"] = [d / 2 - 1 for d in digits]
        return data

    def decode(self, data, *, vae_image_sizes, **options):
        assert options["verbose"] is False
        images = []
        for quants, keep_k, rng, (h, w) in zip(
            data["quants"], data["eval_keep_k"], data["rng"], vae_image_sizes, strict=True
        ):
            quants = quants.clone()
            quants[:, keep_k:] = 0.3 * torch.randn(quants[:, keep_k:].shape, generator=rng)
            images.append(nn.functional.interpolate(quants.mT.unflatten(2, (2, 2)), size=(h, w)))
        data["rgb_reconst"] = images
        return data


def run_sweep(model, batches, options, judges=NO_JUDGES, folder=None):
    """Encode and measure at all points; what was measured stays in `folder`, if one is given."""
    settings = options if isinstance(options, EvaluationSettings) else settings_with(**options)
    device = torch.device("cpu")
    with TemporaryDirectory() as temporary:
        encoded = encode_split(model, batches, settings, device=device, judges=judges)
        points = make_grid(settings, resolve_keep_ks(settings.keep_ks, model.num_registers))
        curves = list(dict.fromkeys(point.curve for point in points))
        searches = make_searches(settings.targets or (), curves, model.num_registers)
        store = PointStore(Path(folder or temporary), "points", encoded.keys)
        return run_points(
            model, encoded, batches, points, searches, settings, device=device, judges=judges, store=store
        )


def settings_with(**options):
    return EvaluationSettings.from_mapping({**SETTINGS, **options})


def random_batches(num_images, batch_size, *, size=8, order=None):
    """Batches of fixed images with their keys, in the given order."""
    images = torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1
    order = list(range(num_images)) if order is None else order
    return [
        {"image": images[part], "key": [f"image-{i}" for i in part]}
        for part in (order[start : start + batch_size] for start in range(0, num_images, batch_size))
    ]
