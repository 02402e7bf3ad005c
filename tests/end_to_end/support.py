"""Training, exporting and evaluating as the commands do, in this process: the imports alone take seconds."""

import csv

import torch
from omegaconf import OmegaConf

from flextok.cli import main
from flextok.config import compose
from flextok.evaluation.run import run as run_evaluation
from flextok.training.run import run as run_training

# A run of a few steps on the CPU, whatever its data and model; all batches are small.
SHORT = (
    "trainer.accelerator=cpu",
    "trainer.max_steps=12",
    "trainer.val_check_interval=6",
    "trainer.limit_val_batches=1",
    "trainer.log_every_n_steps=1",
    "optimizer.warmup_steps=2",
    "data.batch_size=16",
    "data.eval_batch_size=16",
    "callbacks.progress=null",
    "callbacks.pictures=null",
)
QUICK = ("evaluation.num_images=4", "evaluation.steps=2", "evaluation.device=cpu")


def train(folder, *overrides):
    """The last value of every metric of a short run, which lies in `folder`."""
    cfg = compose([*SHORT, *overrides])
    OmegaConf.update(cfg, "paths.run", str(folder))
    return run_training(cfg)


def export(run, folder):
    assert main(["export", str(run), str(folder)]) == 0
    return folder


def evaluate(checkpoint, folder, *overrides):
    """What `metrics.json` holds after an evaluation of four images."""
    options = [*QUICK, f"checkpoint={checkpoint}", f"output_dir={folder}", *overrides]
    return run_evaluation(compose(options, "eval"))[0]


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def decode(model, tokens, *, keep_k, size):
    """Images from the first `keep_k` tokens; the same noise in every call."""
    generator = torch.Generator().manual_seed(0)
    kept = [ids[:, :keep_k] for ids in tokens]
    return model.detokenize(kept, vae_image_sizes=size, timesteps=4, generator=generator, verbose=False)


def outline(node):
    """A config without its values: targets and names of fields."""
    if isinstance(node, dict):
        return {key: value if key == "_target_" else outline(value) for key, value in node.items()}
    return None
