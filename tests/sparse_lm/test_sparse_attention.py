"""Maskers inside a language model: every path gives the same, rows keep their state, nothing of it stays."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, MistralConfig

from flextok.attention.sparse import ResearchAttention, build_config, masked_attention
from flextok.sparse_lm import sparse_attention
from tests.attention.sparse.problems import hash_weights
from tests.sparse_lm.models import FAMILIES, SIZES, SPECIAL, model_of, random_ids
from tests.support import max_difference

SINK = {"type": "SinkMasker", "sink_size": 2}
LOCAL = {"type": "LocalMasker", "window_size": 4, "dense_when_short": False}
HASH = {
    "type": "HashAttentionTopKMasker",
    "heavy_size": 4,
    "hat_bits": 32,
    "hat_mlp_layers": 2,
    "hat_mlp_hidden_size": 8,
    "hat_mlp_activation": "relu",
    "hat_weights": hash_weights(6) | {1: hash_weights(6)[0]},
    "cache_keys": True,
}
LISTS = {
    "sink_local": [SINK, LOCAL],
    "shares": [{"type": "SinkMasker", "sink_size": 0.1}, {**LOCAL, "window_size": 0.2}],
    "oracle_top_k": [SINK, LOCAL, {"type": "OracleTopK", "heavy_size": 3}],
    "hash": [SINK, LOCAL, HASH],
    "magicpig": [SINK, LOCAL, {"type": "MagicPig", "lsh_l": 4, "lsh_k": 3, "cache_keys": True}],
    "random": [SINK, LOCAL, {"type": "RandomSamplingMasker", "sampling_rate": 0.3}],
}
each_list = pytest.mark.parametrize("name", LISTS)


def generated(model, ids, specs, *, mask=None, steps=6, **options):
    """Logits of a prefill and of the steps after it, greedily."""
    with torch.no_grad(), sparse_attention(model, build_config(specs), **options):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specs", [[], [{"type": "OracleTopK", "heavy_size": 1.0}], [SINK, {"type": "CausalMasker"}]])
def test_all_keys_are_dense_attention(family, specs):
    model, ids = model_of(FAMILIES[family]), random_ids(2, 20)
    with torch.no_grad():
        dense = model(ids).logits
        with sparse_attention(model, build_config(specs), measure=True) as state:
            assert max_difference(model(ids).logits, dense) < 1e-5
        assert state.density == 1
    assert max_difference(generated(model, ids, specs), generated(model, ids, [])) < 1e-5


@each_list
def test_decoding_by_gathered_keys_is_decoding_from_all_scores(name):
    model, ids = model_of(FAMILIES["llama"]), random_ids(2, 24)
    gathered, checked = (generated(model, ids, LISTS[name], gather=gather) for gather in (True, False))
    assert max_difference(gathered, checked) < 1e-4
    assert max_difference(gathered, generated(model, ids, [])) > 1e-2


def test_a_windowed_prefill_is_that_of_the_research_path(monkeypatch):
    model, ids = model_of(FAMILIES["llama"]), random_ids(1, 40)
    monkeypatch.setattr("flextok.sparse_lm.prefill.CHUNK", 16)
    for name in ("sink_local", "shares"):
        with torch.no_grad(), sparse_attention(model, build_config(LISTS[name]), measure=True) as state:
            windowed = model(ids).logits
            density = state.density
        with torch.no_grad(), sparse_attention(model, build_config(LISTS[name]), measure=True) as state:
            # A mask of four dimensions takes the path of all scores.
            full = model(ids, attention_mask=torch.ones(40, 40, dtype=torch.bool).tril()[None, None]).logits
        assert max_difference(windowed, full) < 1e-4
        assert 0 < density == state.density < 0.6


def test_a_layer_computes_what_masked_attention_does(monkeypatch):
    """A decoding step of one layer, worked out beside the model."""
    model, ids = model_of(FAMILIES["llama"]), random_ids(1, 12)
    seen = []
    config = build_config(LISTS["oracle_top_k"])
    original = ResearchAttention.build_mask

    def recorded(self, q, k, v, mask, scaling, *args, **kwargs):
        result = original(self, q, k, v, mask, scaling, *args, **kwargs)
        seen.append((q, k, mask, result, scaling, v))
        return result

    monkeypatch.setattr(ResearchAttention, "build_mask", recorded)
    with torch.no_grad(), sparse_attention(model, config):
        model(ids)
    q, k, mask, chosen, scaling, v = seen[0]
    assert torch.equal(mask[0, 0], torch.ones(12, 12, dtype=torch.bool).tril())
    _, weights = masked_attention(q, k, v, chosen, scaling, mask)
    assert ((weights > 0).sum(-1) <= 2 + 4 + 3).all()
    assert scaling == 8**-0.5


@each_list
def test_padded_batches_are_single_prompts(name):
    model = model_of(FAMILIES["llama"])
    prompts = [random_ids(1, length, seed=length) for length in (23, 9, 16)]
    ids = torch.cat([torch.nn.functional.pad(prompt, (23 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.tensor([[0] * (23 - p.shape[1]) + [1] * p.shape[1] for p in prompts])
    together = generated(model, ids, LISTS[name], mask=mask)
    for row, prompt in enumerate(prompts):
        assert max_difference(together[row], generated(model, prompt, LISTS[name])[0]) < 1e-4


def test_beam_search_finds_the_state_of_its_rows_again():
    """Beams are repeated, reordered and dropped; without cached keys there is nothing to get wrong."""
    model, ids = model_of(FAMILIES["llama"]), random_ids(2, 14)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    results = []
    for specs in (LISTS["hash"], [SINK, LOCAL, {**HASH, "cache_keys": False}]):
        with torch.no_grad(), sparse_attention(model, build_config(specs)):
            results.append(model.generate(ids, **options))
    assert torch.equal(*results)


def one_step(model, token, cache):
    return model(token, past_key_values=cache, use_cache=True).logits[:, -1]


def prefilled(model, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def test_rows_may_be_reordered_selected_and_repeated_between_steps():
    model, ids = model_of(FAMILIES["llama"]), random_ids(3, 15)
    order, token = torch.tensor([2, 0, 2]), random_ids(3, 1, seed=1)
    config = build_config(LISTS["magicpig"])
    with sparse_attention(model, config) as state:
        cache = prefilled(model, ids)
        one_step(model, token, cache)
        before = state.sequences
        cache.reorder_cache(order)
        moved = one_step(model, token[order], cache)
        assert state.sequences[0] is before[2]
        assert state.sequences[1] is before[0]
        assert state.sequences[2] is not before[2]
        assert len({id(sequence) for sequence in state.sequences}) == 3
    for row, source in enumerate(order.tolist()):
        with sparse_attention(model, config):
            cache = prefilled(model, ids[source : source + 1])
            one_step(model, token[source : source + 1], cache)
            alone = one_step(model, token[source : source + 1], cache)
        assert max_difference(moved[row], alone[0]) < 1e-4


@torch.no_grad()
def test_finished_rows_may_leave_and_a_cropped_cache_starts_anew():
    model, ids, token = model_of(FAMILIES["llama"]), random_ids(3, 15), random_ids(3, 1, seed=1)
    with sparse_attention(model, build_config(LISTS["hash"])) as state:
        cache = prefilled(model, ids)
        one_step(model, token, cache)
        known = state.sequences[1]
        cache.batch_select_indices(torch.tensor([1]))
        one_step(model, token[1:2], cache)
        assert state.sequences == [known]
        cache.crop(-5)
        again = one_step(model, token[1:2], cache)
        assert state.sequences[0] is not known
    with sparse_attention(model, build_config(LISTS["hash"])):
        assert max_difference(again, one_step(model, token[1:2], prefilled(model, ids[1:2, :12]))) < 1e-4


@torch.no_grad()
def test_keys_are_hashed_once_as_the_cache_grows():
    model, ids = model_of(FAMILIES["llama"]), random_ids(1, 15)
    with sparse_attention(model, build_config(LISTS["hash"])) as state:
        cache = prefilled(model, ids)
        for length in (16, 17, 18):
            one_step(model, ids[:, :1], cache)
            signatures = state.sequences[0].meta_data["hash_attention"]
            assert {layer: x.shape[-1] for layer, x in signatures.items()} == {0: length, 1: length}


@torch.no_grad()
def test_dictionaries_of_the_caller_are_used():
    model, ids = model_of(FAMILIES["llama"]), random_ids(2, 15)
    mine = [{}, {}]
    with sparse_attention(model, build_config(LISTS["hash"])):
        model(ids, sparse_meta_data=mine)
        assert mine[0]["hash_attention"][1].shape == mine[1]["hash_attention"][1].shape
        for wrong in ({}, [{}], [{}, None]):
            with pytest.raises(ValueError, match="sparse_meta_data is a .* for 2 rows; valid: a dictionary per row"):
                model(ids, sparse_meta_data=wrong)


@torch.no_grad()
def test_only_decoding_is_sparse_after_a_dense_prefill():
    model, ids = model_of(FAMILIES["llama"]), random_ids(2, 20)
    expected = model(ids).logits
    with sparse_attention(model, build_config(LISTS["oracle_top_k"]), dense_prefill=True):
        assert max_difference(model(ids).logits, expected) < 1e-5
        cache = prefilled(model, ids)
        sparse = one_step(model, ids[:, :1], cache)
    assert max_difference(sparse, one_step(model, ids[:, :1], prefilled(model, ids))) > 1e-2


@torch.no_grad()
def test_the_model_is_as_before_also_after_an_error():
    model, ids = model_of(FAMILIES["llama"]), random_ids(1, 20)
    before = model(ids).logits
    with sparse_attention(model, build_config(LISTS["random"])):
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(RuntimeError, match="stop"), sparse_attention(model, build_config([])):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_samplers_follow_the_seed():
    model, ids = model_of(FAMILIES["llama"]), random_ids(1, 20)
    first, again, other = (generated(model, ids, LISTS["random"], seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_what_cannot_be_done_is_refused():
    model, ids = model_of(FAMILIES["llama"]), random_ids(2, 10)
    right_padded = torch.tensor([[1] * 10, [1] * 8 + [0] * 2])
    with sparse_attention(model, build_config([SINK])):
        with pytest.raises(ValueError, match="padded on the left"):
            model(ids, attention_mask=right_padded)
        with pytest.raises(ValueError, match="a cache that grows"):
            model.generate(ids, max_new_tokens=3, cache_implementation="static", attention_mask=torch.ones_like(ids))
        with pytest.raises(ValueError, match="calls of the model that the block was given"):
            model.model(ids)
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        model.train()
        with pytest.raises(ValueError, match=r"model.eval\(\)"):
            model(ids)
    with pytest.raises(TypeError, match="config is a list"), sparse_attention(model, []):
        pass
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SIZES, **SPECIAL, num_attention_heads=6, num_key_value_heads=2, sliding_window=6),
        Gemma2Config(**SIZES, **SPECIAL, num_attention_heads=6, num_key_value_heads=2),
    ],
)
def test_layers_with_windows_are_refused(config):
    model = AutoModelForCausalLM.from_config(config)
    with (
        pytest.raises(ValueError, match="has layers of another kind, sliding"),
        sparse_attention(model, build_config([SINK])),
    ):
        pass
