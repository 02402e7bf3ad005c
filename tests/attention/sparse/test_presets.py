"""Every preset runs: as a mask, as attention, and by gathered keys where its maskers can select."""

import pytest
import torch
from torch.testing import assert_close

from flextok.attention.sparse import PRESETS, ResearchAttention, preset
from tests.attention.sparse.problems import hash_weights

WEIGHTS = {"hat_weights": hash_weights(4), "hat_bits": 32, "hat_mlp_layers": 2, "hat_mlp_hidden_size": 8}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_preset_runs(name, num_queries):
    config = preset(name, **(WEIGHTS if name == "hash" else {}))
    attention = ResearchAttention.create_from_config(config)
    q, k, v = torch.randn(2, 4, num_queries, 8), torch.randn(2, 2, 1000, 8), torch.randn(2, 2, 1000, 8)
    common = {"queries": q, "keys": k, "values": v, "attention_mask": None, "scaling": 8**-0.5}
    mask = attention.build_mask(**common, dropout=0.0, sparse_meta_data={}, layer_idx=0)
    assert 256 / 1000 <= mask.get_density() + 1e-3 < 1
    output, weights = attention.custom_attention(
        None, **common, dropout=0.0, sparse_meta_data={}, layer_idx=0, generator=torch.Generator().manual_seed(0)
    )
    assert output.shape == (2, num_queries, 4, 8)
    assert_close(weights.sum(-1), torch.ones(2, 4, num_queries))
    if name in ("sink_local", "hash", "magicpig"):
        gathered = attention.gathered_attention(**common, sparse_meta_data={}, layer_idx=0)
        assert_close(gathered, output, rtol=0, atol=2e-5)


def test_fields_of_the_last_masker_can_be_given():
    assert preset("sink_local", window_size=64).masker_configs[1].window_size == 64
    assert preset("oracle_top_k", heavy_size=0.2).masker_configs[-1].heavy_size == 0.2


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sink", {}, "preset 'sink' is unknown; valid: sink_local"),
        ("sink_local", {"width": 3}, "width: LocalMasker has no such field"),
        ("hash", {}, "hat_weights, hat_weight_file"),
        ("magicpig", {"lsh_k": 100}, "lsh_k=100"),
    ],
)
def test_what_no_preset_has_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **fields)
