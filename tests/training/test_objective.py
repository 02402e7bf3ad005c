import pytest
import torch

from flextok.model.packed_list import PackedList
from flextok.training.objective import RectifiedFlowObjective, per_sample_mse


def samples(*values, size=2):
    return [torch.full((1, 3, size, size), float(value)) for value in values]


def test_loss_is_the_squared_distance_to_noise_minus_clean():
    errors = per_sample_mse(samples(0, 1), noise=samples(3, 3), clean=samples(1, 1))
    assert errors.tolist() == [4.0, 1.0]


def test_lists_and_packed_batches_give_the_same():
    predicted, noise, clean = (torch.randn(4, 3, 2, 2).split(1) for _ in range(3))
    packed = [PackedList.pack(entries) for entries in (predicted, noise, clean)]
    torch.testing.assert_close(per_sample_mse(*packed), per_sample_mse(predicted, noise, clean))


def test_each_sample_counts_once_whatever_its_size():
    noise, clean = samples(2) + samples(2, size=4), samples(0) + samples(0, size=4)
    predicted = samples(2) + samples(1, size=4)
    assert per_sample_mse(predicted, noise, clean).tolist() == [0.0, 1.0]


def test_half_precision_predictions_are_compared_in_float32():
    errors = per_sample_mse([t.bfloat16() for t in samples(0)], samples(0.001), samples(0))
    assert errors.dtype == torch.float32
    assert errors.item() == pytest.approx(1e-6)


def test_objective_follows_the_model_by_hand(small_model):
    data = {"rgb": torch.randn(3, 3, 8, 8).split(1), "rng": torch.Generator().manual_seed(0)}
    total = RectifiedFlowObjective()(small_model, data)["total"]
    by_hand = torch.stack(
        [
            (v - (n - c)).square().mean()
            for v, n, c in zip(data["vae_latents_reconst"], data["flow_noise"], data["vae_latents"], strict=True)
        ]
    ).mean()
    torch.testing.assert_close(total, by_hand)
    total.backward()
    assert small_model.encoder.module_dict["enc_register_module"].registers.grad.abs().sum() > 0
