"""What training minimises: the squared error of the predicted velocity."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flextok.flextok_wrapper import FlexTok
from flextok.flow_matching.path import target_velocity
from flextok.model.data_dict import DataDict
from flextok.model.packed_list import PackedList


class RectifiedFlowObjective:
    """Rectified flow: the velocity from data to noise is their difference, at every time."""

    def __call__(self, model: FlexTok, data: DataDict) -> dict[str, Tensor]:
        """Run one training forward; `total` is the mean over samples of the mean squared error of each."""
        data = model(data)
        noise = data[model.flow_matching_noise_module.noise_write_key]
        return {"total": velocity_errors(model, data, noise).mean()}


def velocity_errors(model: FlexTok, data: DataDict, noise: Sequence[Tensor]) -> Tensor:
    """The mean squared error of each sample, `[batch]`, after the decoder has run."""
    predicted = data[model.pipeline.reconst_write_key]
    clean = data[model.flow_matching_noise_module.clean_images_read_key]
    return per_sample_mse(predicted, noise, clean)


def per_sample_mse(predicted: Sequence[Tensor], noise: Sequence[Tensor], clean: Sequence[Tensor]) -> Tensor:
    """Per sample mean squared error of `predicted` to `noise - clean` in float32; sizes may differ."""
    if len({tuple(entry.shape) for entry in clean}) == 1:
        p, n, c = (PackedList.pack(entries).tensor.float() for entries in (predicted, noise, clean))
        return (p - target_velocity(c, n)).square().flatten(1).mean(1)
    rows = [per_sample_mse([p], [n], [c]) for p, n, c in zip(predicted, noise, clean, strict=True)]
    return torch.cat(rows)
