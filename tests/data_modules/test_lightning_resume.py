"""Lightning stores the position by itself; training goes on with the batches it would have had."""

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.data_modules.images import photos

NUM_STEPS = 12  # five steps make an epoch


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


def fit(folder, *, ckpt_path=None, num_workers=0, every=None, make_data=photos, **settings):
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
        **({"max_steps": NUM_STEPS} | settings),
    )
    data = make_data(num_workers=num_workers)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num_workers", "every", "settings"),
    [
        (0, 1, {}),
        (0, None, {}),
        (0, 1, {"limit_train_batches": 3}),
        (0, None, {"limit_train_batches": 3}),
        (0, 1, {"val_check_interval": 2}),
        (0, None, {"max_steps": -1, "max_epochs": 3}),
        (2, 4, {}),
        (2, None, {"limit_train_batches": 3}),
    ],
)
def test_resuming_from_any_checkpoint_gives_the_remaining_batches(tmp_path, num_workers, every, settings):
    whole = fit(tmp_path / "whole", num_workers=num_workers, every=every, **settings)
    checkpoints = {int(path.stem.split("=")[1]): path for path in (tmp_path / "whole").glob("*.ckpt")}
    assert checkpoints
    for step, path in checkpoints.items():
        rest = fit(tmp_path / "rest", ckpt_path=path, num_workers=num_workers, every=every, **settings)
        assert rest == whole[step:], step


@pytest.mark.filterwarnings("ignore")
def test_overfit_batches_repeats_the_same_images(tmp_path):
    seen = fit(tmp_path, every=1, overfit_batches=2, max_steps=6)
    assert seen == seen[:2] * 3
