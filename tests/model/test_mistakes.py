"""What a caller can get wrong in Python is refused with the field, the value and what is valid."""

import pytest
import torch

from flextok.model.preprocessors.attention_masked_nested_dropout import AttentionMaskedNestedDropout
from flextok.model.preprocessors.token_dropout import MaskedNestedDropout
from flextok.utils.checkpoint import load_model_from_safetensors


@pytest.fixture
def model(recorded_folder):
    return load_model_from_safetensors(recorded_folder / "tiny_flextok" / "model.safetensors")


@pytest.mark.parametrize("keep_ks", [[-1, 2], [4.9, 2], 3, [1], [1, 2, 3]])
@pytest.mark.parametrize("make", [lambda: MaskedNestedDropout("x", dim=4), lambda: AttentionMaskedNestedDropout("x")])
def test_keep_k_is_one_whole_number_per_sample(make, keep_ks):
    with pytest.raises(ValueError, match="eval_keep_k=.*2 whole numbers"):
        make().eval()({"x": [torch.zeros(1, 3, 4)] * 2, "eval_keep_k": keep_ks})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae_image_sizes": [(8, 8)]}, "2 pairs"),
        ({"timesteps": 0}, "timesteps"),
        ({"vae_image_sizes": [(8, 8, 8)] * 2}, "vae_image_sizes"),
    ],
)
def test_wrong_options_of_decoding_are_named(model, options, message):
    ids = [torch.zeros(1, 4, dtype=torch.int64)] * 2
    with pytest.raises(ValueError, match=message):
        model.detokenize(ids, **({"vae_image_sizes": 8} | options))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([torch.full((1, 4), 64000)], "0 to 63999"),
        ([torch.full((1, 4), -1)], "0 to 63999"),
        ([torch.zeros(1, 17, dtype=torch.int64)], "1..16"),
        ([torch.zeros(4, dtype=torch.int64)], r"\[1, l\]"),
    ],
)
def test_wrong_tokens_are_named(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model.detokenize(ids, vae_image_sizes=8)


def test_a_misspelt_option_is_reported(model, caplog):
    model.detokenize([torch.zeros(1, 4, dtype=torch.int64)], vae_image_sizes=8, timesteps=1, timestep=2, verbose=False)
    assert "decode ignores timestep" in caplog.text
