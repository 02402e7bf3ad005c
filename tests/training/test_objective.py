import hydra
import pytest
import torch

from flextok.model.packed_list import PackedList
from flextok.training.objective import PASSES_KEY, RectifiedFlowObjective, per_sample_mse
from tests.support import randomize, tokens_processed
from tests.training.support import small_config


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
    losses = RectifiedFlowObjective()(small_model, data)
    assert losses.keys() == {"total"}
    total = losses["total"]
    by_hand = torch.stack(
        [
            (v - (n - c)).square().mean()
            for v, n, c in zip(data["vae_latents_reconst"], data["flow_noise"], data["vae_latents"], strict=True)
        ]
    ).mean()
    torch.testing.assert_close(total, by_hand)
    total.backward()
    assert small_model.encoder.module_dict["enc_register_module"].registers.grad.abs().sum() > 0


FORMS = ("mask_token", "attention_mask", "packed")


def batch():
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"rgb": images.split(1), "rng": torch.Generator().manual_seed(0)}


def model_for_both(tmp_path, form, *overrides):
    cfg = small_config(tmp_path, "objective=prefix_and_full", f"dropout={form}", *overrides)
    return randomize(hydra.utils.instantiate(cfg.model, _convert_="all")).train(), cfg


@pytest.mark.parametrize("form", FORMS)
def test_prefix_and_full_length_share_one_encoding(tmp_path, form):
    model, cfg = model_for_both(tmp_path, form)
    data = batch()
    with tokens_processed(model) as rows:
        losses = hydra.utils.instantiate(cfg.objective)(model, data)
    assert {name: len(passes) for name, passes in rows.items()} == {"enc_transformer": 1, "dec_transformer": 2}
    torch.testing.assert_close(losses["total"], (losses["flow_prefix"] + losses["flow_full"]) / 2)
    assert min(data["train_keep_k"]) < 4  # the dictionary is left as the random prefixes had it
    losses["total"].backward()
    assert model.encoder.module_dict["enc_to_latents"].proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("form", FORMS)
def test_full_length_is_what_evaluation_decodes_from_all_tokens(tmp_path, form):
    model, _ = model_for_both(tmp_path, form, "size.null_condition_prob=0")
    with torch.no_grad():
        full = RectifiedFlowObjective(prefix_weight=0.0, full_weight=2.0)(model, batch())
        assert full.keys() == {"total"}
        # Evaluation draws no keep_k, which comes first in training: then the noise is the same.
        data = batch()
        torch.rand(6, generator=data["rng"])
        data = model.eval()(data)
    expected = per_sample_mse(data["vae_latents_reconst"], data["flow_noise"], data["vae_latents"]).mean()
    torch.testing.assert_close(full["total"], expected)


def test_the_full_length_depends_on_the_last_register(tmp_path):
    model, _ = model_for_both(tmp_path, "mask_token", "size.null_condition_prob=0")
    RectifiedFlowObjective(prefix_weight=0.0, full_weight=1.0)(model, batch())["total"].backward()
    assert model.encoder.module_dict["enc_register_module"].registers.grad[-1].abs().sum() > 0


def test_passes_count_by_their_weights(tmp_path):
    model, _ = model_for_both(tmp_path, "mask_token")
    losses = RectifiedFlowObjective(prefix_weight=3.0, full_weight=1.0)(model, batch())
    torch.testing.assert_close(losses["total"], 0.75 * losses["flow_prefix"] + 0.25 * losses["flow_full"])


def test_an_encoder_that_leaves_registers_out_is_refused(tmp_path):
    name = "model.encoder.module_dict.enc_seq_packer.sampled_keep_k_read_key"
    model, cfg = model_for_both(tmp_path, "mask_token", f"{name}=sampled_keep_k")
    with pytest.raises(ValueError, match=rf"{name}='sampled_keep_k' .* valid: null"):
        hydra.utils.instantiate(cfg.objective)(model, batch())


def test_a_decoder_that_draws_for_itself_is_refused(tmp_path):
    name = "model.decoder.module_dict.dec_nested_dropout.sampled_keep_k_read_key"
    model, cfg = model_for_both(tmp_path, "mask_token", f"{name}=null")
    with pytest.raises(ValueError, match=rf"{name}=None .* valid: a key"):
        hydra.utils.instantiate(cfg.objective)(model, batch())


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0)])
def test_weights_that_leave_nothing_are_refused(weights):
    with pytest.raises(ValueError, match=r"objective.prefix_weight=.* valid: numbers from 0 on"):
        RectifiedFlowObjective(prefix_weight=weights[0], full_weight=weights[1])


@pytest.mark.parametrize("form", FORMS)
def test_each_pass_leaves_its_errors_times_and_numbers_of_tokens(tmp_path, form):
    model, cfg = model_for_both(tmp_path, form, "size.null_condition_prob=0.5")
    data = batch()
    losses = hydra.utils.instantiate(cfg.objective)(model, data)
    full, prefix = data[PASSES_KEY]
    for name, one in (("full", full), ("prefix", prefix)):
        torch.testing.assert_close(one.errors.mean(), losses[f"flow_{name}"].detach())
        assert not one.errors.requires_grad
        assert one.times.shape == one.kept.shape == (6,)
    null = torch.tensor(data["sampled_null"])
    assert 0 < null.sum() < 6
    torch.testing.assert_close(prefix.kept, torch.tensor(data["train_keep_k"]).where(~null, 0))
    torch.testing.assert_close(full.kept, torch.full((6,), 4).where(~null, 0))
