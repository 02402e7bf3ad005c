"""Training runs that learn nothing and write down which images they were given."""

import warnings

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn


class Recorder(LightningModule):
    """Trains nothing and remembers which images it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["key"])
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, data, *, ckpt_path=None, every=None, **settings):
    """The keys of all batches of a run, which saves after so many steps, or after each epoch."""
    module = Recorder()
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=every, every_n_epochs=None if every else 1
    )
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about tiny runs
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.seen


def assert_resumes_everywhere(folder, make, **settings):
    """A run on `make()` resumed from each of its checkpoints gets the batches it would have had."""
    whole = fit(folder / "whole", make(), **settings)
    checkpoints = {int(path.stem.split("=")[1]): path for path in (folder / "whole").glob("*.ckpt")}
    assert checkpoints
    for step, path in checkpoints.items():
        assert fit(folder / "rest", make(), ckpt_path=path, **settings) == whole[step:], step
