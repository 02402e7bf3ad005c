"""Rules of single maskers that recorded cases and properties do not show."""

import logging

import pytest
import torch
from torch.testing import assert_close

from flextok.attention.sparse import Mask, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
from flextok.attention.sparse.lsh import Tables, collision_probability
from flextok.attention.sparse.signatures import hamming_distance, pack_bits, popcount, popcount_by_arithmetic
from flextok.attention.sparse.top_p import heaviest
from tests.attention.sparse.problems import hash_weights, specs
from tests.attention.sparse.vectors import attention_of, mask_of


def problem(num_queries=1, num_keys=20, heads=2, kv_heads=1, batch=1, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, h, n, width) for h, n in ((heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys))]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def add(spec, tensors, previous=None, attention_mask=None, state=None, **kwargs):
    """Values after one masker, `(B, H, Sq, Sk)`."""
    q, k, v = tensors
    shape = (*q.shape[:3], k.shape[2])
    mask = (
        attention_of([spec])
        .maskers[0]
        .add_mask(
            keys=k,
            queries=q,
            values=v,
            attention_mask=attention_mask,
            scaling=0.3,
            dropout=0.0,
            sparse_meta_data={} if state is None else state,
            previous_mask=Mask.create_empty_mask(shape) if previous is None else previous,
            **({"layer_idx": 0} | kwargs),
        )
    )
    return mask.get_dense_mask()


def zero_scores(num_keys):
    """Queries and keys of which all scores are 0."""
    return torch.zeros(1, 1, 1, 8), torch.randn(1, 1, num_keys, 8), torch.randn(1, 1, num_keys, 8)


# --- places -----------------------------------------------------------------------------------------------------------


def local(window, **options):
    return {"type": "LocalMasker", "window_size": window} | options


@pytest.mark.parametrize(("window", "expected"), [(1, 1.0), (0.05, 1.0), (3, 1.0)])
def test_a_short_trailing_window_is_dense_unless_told_otherwise(window, expected):
    tensors = problem(num_queries=20)
    assert add(local(window), tensors).mean() == expected
    assert add(local(window, dense_when_short=False), tensors).mean() < 0.2


def test_a_local_window_keeps_keys_above_its_diagonal():
    tensors = problem(num_queries=4, num_keys=12)
    previous = torch.zeros(1, 2, 4, 12)
    previous[..., -1] = 0.5
    values = add(local(2), tensors, mask_of(previous))
    assert (values[..., :-1, -1] == 0.5).all()
    assert (values[..., -1, -1] == 1).all()


@pytest.mark.parametrize(
    "spec", [local(0.04), local(0.04, mode="centered"), {"type": "SinkMasker", "sink_size": 0.04}], ids=str
)
@pytest.mark.parametrize("num_queries", [1, 20])
def test_a_share_that_comes_to_no_key_adds_nothing(spec, num_queries):
    assert not add(spec, problem(num_queries=num_queries)).any()


@pytest.mark.parametrize(("share", "num_keys", "expected"), [(0.29, 100, 28), (2.0, 10, 10), (1.0, 7, 7), (0.5, 7, 3)])
def test_shares_are_truncated(share, num_keys, expected):
    values = add({"type": "SinkMasker", "sink_size": share}, problem(num_keys=num_keys))
    assert values.sum(-1).unique().tolist() == [expected]


# --- the best keys ----------------------------------------------------------------------------------------------------


def test_top_k_takes_the_first_of_equal_keys_and_counts_new_ones():
    tensors = zero_scores(9)
    previous = torch.tensor([1.0, 0, 0.5, 0, 0, 0, 0, 0, 0]).reshape(1, 1, 1, 9)
    values = add({"type": "OracleTopK", "heavy_size": 3}, tensors, mask_of(previous))
    assert values.flatten().tolist() == [1, 1, 0.5, 1, 1, 0, 0, 0, 0]


def test_top_k_takes_allowed_keys_only_even_if_they_are_few():
    allowed = torch.tensor([False, True, False, False, True, False]).reshape(1, 1, 1, 6)
    for attention_mask in (allowed, torch.zeros(1, 1, 1, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)):
        values = add({"type": "OracleTopK", "heavy_size": 4}, zero_scores(6), attention_mask=attention_mask)
        assert values.flatten().tolist() == [0, 1, 0, 0, 1, 0]


def test_oracle_top_k_ranks_true_logits():
    q, k = torch.ones(1, 1, 1, 8), torch.tensor([1.0, 2.0, 0.0]).reshape(1, 1, 3, 1).expand(1, 1, 3, 8)
    # Products 8, 16, 0, times 0.3, plus the bias: 5.4, 4.8, 3.
    bias = torch.tensor([3.0, 0.0, 3.0]).reshape(1, 1, 1, 3)
    assert add({"type": "OracleTopK", "heavy_size": 1}, (q, k, k), attention_mask=bias).flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize(("top_p", "expected"), [(0, 4), (0.5, 4), (1, 4), (0.0, 4)])
def test_top_p_takes_all_equals_of_the_threshold(top_p, expected):
    assert add({"type": "OracleTopPMasker", "top_p": top_p}, zero_scores(4)).sum() == expected


def test_top_p_is_a_share_of_what_is_left_and_leaves_full_rows_alone():
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([0.9, 0.05, 0.03, 0.02]).log().reshape(1, 1, 4, 1) / 0.3
    spec = {"type": "OracleTopPMasker", "top_p": 0.45}
    assert add(spec, (q, k, k)).flatten().tolist() == [1, 0, 0, 0]
    previous = mask_of(torch.tensor([1.0, 0, 0, 0]).reshape(1, 1, 1, 4))
    assert add(spec, (q, k, k), previous).flatten().tolist() == [1, 1, 0, 0]
    half = torch.full((1, 1, 1, 4), 0.5)
    assert torch.equal(add(spec, (q, k, k), mask_of(half)), half)


def test_top_p_takes_one_key_more_where_the_sum_is_exactly_the_share():
    scores = torch.randn(1, 8)
    sums = scores.softmax(-1).sort(descending=True).values.cumsum(-1)[0]
    for rank in range(7):
        chosen = heaviest(scores, sums[rank].item(), torch.ones(1, 8, dtype=torch.bool))
        assert chosen.sum() == rank + 2


# --- HashAttention ----------------------------------------------------------------------------------------------------


def hash_spec(weights, size=3, bits=32, layers=2, hidden=8, **options):
    names = {"hat_bits": bits, "hat_mlp_layers": layers, "hat_mlp_hidden_size": hidden, "hat_mlp_activation": "tanh"}
    return {"type": "HashAttentionTopKMasker", "heavy_size": size, "hat_weights": weights} | names | options


def test_a_zero_of_the_perceptron_counts_as_positive():
    weights = {
        0: {
            "query_matrix": [torch.zeros(1, 8, 4)],
            "query_bias": [torch.tensor([[0.0, -1.0, 0.0, 1.0]])],
            "key_matrix": [torch.zeros(1, 8, 4)],
            "key_bias": [torch.tensor([[1.0, -1.0, 1.0, 1.0]])],
        }
    }
    masker = attention_of([hash_spec(weights, bits=4, layers=1)]).maskers[0]
    q, k, _ = problem(heads=1)
    assert (masker.scores(q, k, None, 1.0, {}, layer_idx=0) == 4).all()


def test_without_cached_keys_other_keys_of_the_same_length_are_hashed():
    first, second, state = problem(seed=1), problem(seed=2), {}
    spec = hash_spec(hash_weights(2))
    add(spec, first, state=state)
    assert torch.equal(add(spec, second, state=state), add(spec, second))
    assert not torch.equal(add(spec, first), add(spec, second))


@pytest.mark.parametrize("name", ["hash", "magic_pig"])
def test_keys_that_were_cached_may_only_grow(name):
    state, spec = {}, specs(2)[name] | {"cache_keys": True}
    add(spec, problem(num_keys=12), state=state)
    with pytest.raises(ValueError, match="keys that only grow"):
        add(spec, problem(num_keys=11), state=state)
    with pytest.raises(ValueError, match="keys that only grow"):
        add(spec, problem(num_keys=14, batch=2), state=state)
    add(spec, problem(num_keys=12), state=state, layer_idx=0)


@pytest.mark.parametrize("name", ["hash", "magic_pig"])
def test_layers_need_a_number(name):
    with pytest.raises(ValueError, match="give it layer_idx"):
        add(specs(2)[name], problem(), layer_idx=None)


@pytest.mark.parametrize("name", ["hash", "magic_pig"])
def test_state_needs_a_dictionary(name):
    attention = attention_of([specs(2)[name] | {"cache_keys": True}])
    with pytest.raises(ValueError, match="sparse_meta_data=None"):
        attention.build_mask(*problem(), None, 0.3, 0.0, None, layer_idx=0)


@pytest.mark.parametrize("bits", [1, 7, 8, 9, 31, 32, 33, 64, 65, 200])
def test_packed_signatures_count_differing_bits(bits):
    first, second = torch.rand(2, 3, 5, bits) > 0.5, torch.rand(2, 3, 7, bits) > 0.5
    expected = (first[..., :, None, :] != second[..., None, :, :]).sum(-1)
    assert torch.equal(hamming_distance(pack_bits(first), pack_bits(second)).long(), expected)
    words = pack_bits(first)
    assert torch.equal(popcount_by_arithmetic(words), popcount(words))


# --- MagicPig ---------------------------------------------------------------------------------------------------------


def pig(tables=6, bits=3, **options):
    return {"type": "MagicPig", "lsh_l": tables, "lsh_k": bits} | options


@pytest.mark.parametrize(
    "spec", [pig(), pig(min_tables=2), pig(center=False), pig(20, 9), pig(3, 20), pig(2, 40)], ids=str
)
def test_packings_give_equal_results(spec):
    tensors = problem(num_queries=5, num_keys=40)
    assert torch.equal(add(spec, tensors), add(spec | {"packing": "float32"}, tensors))


def test_codes_of_64_bits_stay_distinct():
    lifted = torch.randn(1, 1, 500, 65)
    codes = Tables(1, 64, "int64").hash(lifted, torch.randn(65, 64)).flatten()
    assert len(codes.unique()) == 500
    assert codes.min() < 0 < codes.max()


def test_other_sequences_and_heads_change_nothing():
    q, k, v = problem(num_queries=3, heads=4, kv_heads=2, batch=2)
    k[1, 1] *= 50
    values = add(pig(), (q, k, v))
    for b in range(2):
        for h in range(4):
            alone = [q[b : b + 1, h : h + 1], *(x[b : b + 1, h // 2 : h // 2 + 1] for x in (k, v))]
            assert_close(add(pig(), alone)[0, 0], values[b, h], rtol=0, atol=1e-6)


def test_a_decoder_that_hashes_as_keys_come_equals_one_frame_for_all():
    """The mean and the largest norm stay those of the first call, for keys, queries and probabilities."""
    q, k, v = problem(num_keys=40, batch=2, heads=4, kv_heads=2)
    k[:, :, 30:] *= 3  # Longer than the radius of the first 30.
    state = {}
    add(pig(cache_keys=True), (q, k[:, :, :30], v[:, :, :30]), state=state)
    for length in (31, 33, 40):
        values = add(pig(cache_keys=True), (q, k[:, :, :length], v[:, :, :length]), state=state)
    # The first keys are found as they were, with the probabilities they had.
    assert_close(values[..., :30], add(pig(), (q, k[:, :, :30], v[:, :, :30])), rtol=0, atol=1e-6)
    late = values[..., 30:]
    assert late.any()
    assert ((late > 0) <= (late < 1)).all()


def test_later_keys_have_the_probability_with_which_they_are_found():
    """Over seeds, also for keys that are longer than the radius was."""
    q, k, v = problem(num_keys=12, heads=1)
    k[:, :, 8:] *= 3
    found, stated = torch.zeros(4), torch.zeros(4)
    for seed in range(400):
        state = {}
        spec = pig(2, 2, seed=seed, cache_keys=True)
        add(spec, (q, k[:, :, :8], v[:, :, :8]), state=state)
        values = add(spec, (q, k, v), state=state)[0, 0, 0, 8:]
        found += (values > 0) / 400
        stated = torch.maximum(stated, values)
    assert ((found - stated).abs() <= 5 * (stated * (1 - stated) / 400).sqrt() + 1e-3).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("case", ["one key", "equal keys", "zero query", "zero keys"])
def test_vectors_of_zero_give_finite_probabilities(case, center):
    q, k, v = problem(num_keys=1 if case == "one key" else 6)
    k = k[:, :, :1].expand_as(k) if case == "equal keys" else k * (case != "zero keys")
    q = q * (case != "zero query")
    state = {}
    values = add(pig(8, 1, center=center, cache_keys=True), (q, k, v), state=state)
    assert ((values >= 0) & (values <= 1)).all()
    grown = [torch.cat([x, torch.randn(1, 1, 3, 8)], 2) for x in (k, v)]
    values = add(pig(8, 1, center=center, cache_keys=True), (q, *grown), state=state)
    assert ((values >= 0) & (values <= 1)).all()


def test_probabilities_of_two_tables():
    cosine = torch.linspace(-1, 1, 9, dtype=torch.float64)
    t = (1 - cosine.arccos() / torch.pi) ** 3
    once, twice = (collision_probability(cosine, Tables(5, 3, "int64"), n) for n in (1, 2))
    assert_close(once[1:], (1 - (1 - t) ** 5)[1:])
    assert_close(twice[1:], (1 - (1 - t) ** 5 - 5 * t * (1 - t) ** 4)[1:])
    assert once[0] > 0


def test_hyperplanes_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\['projections'\]\[0\] has shape \[9, 5\]; valid: \[9, 18\]"):
        add(pig(), problem(), state={"projections": {0: torch.zeros(9, 5)}})


# --- random and adaptive sampling -------------------------------------------------------------------------------------


def adaptive(**options):
    default = {"base_rate_sampling": 0.2, "epsilon": 0.2, "delta": 0.2, "init_offset": 0, "local_offset": 0}
    return {"type": "AdaptiveSamplingMasker"} | default | options


def test_a_rate_too_small_for_a_key_draws_one():
    values = add({"type": "RandomSamplingMasker", "sampling_rate": 0.01}, problem(num_queries=9))
    assert ((values > 0).sum(-1) == 1).all()
    assert values.unique().tolist() == [0, pytest.approx(1 / 20)]


def test_a_whole_rate_is_dense():
    assert (add({"type": "RandomSamplingMasker", "sampling_rate": 1}, problem()) == 1).all()


@pytest.mark.parametrize("base", [0, 0.0])
def test_adaptive_sampling_without_a_base_sample_does_nothing(base):
    assert not add(adaptive(base_rate_sampling=base), problem()).any()


@pytest.mark.parametrize("offsets", [(10, 9), (0.5, 0.5), (19, 0), (30, 30)])
def test_adaptive_sampling_of_a_range_below_two_keys_is_dense(offsets):
    assert (add(adaptive(init_offset=offsets[0], local_offset=offsets[1]), problem()) == 1).all()


@pytest.mark.parametrize("epsilon", [0.01, 0.9])
def test_adaptive_sampling_leaves_held_and_outer_keys_alone(epsilon):
    previous = torch.zeros(1, 2, 1, 20)
    previous[..., 5:8], previous[..., 9] = 1.0, 0.5
    values = add(adaptive(init_offset=2, local_offset=3, epsilon=epsilon), problem(), mask_of(previous))
    assert torch.equal(values[..., 5:8], previous[..., 5:8])
    assert (values[..., 9] == 0.5).all()
    assert not values[..., :2].any()
    assert not values[..., 17:].any()
    assert ((values > 0).sum(-1) >= 4 + 2).all()


def test_adaptive_sampling_of_one_residual_key_takes_it():
    previous = torch.ones(1, 2, 1, 20)
    previous[..., 4] = 0
    assert (add(adaptive(), problem(), mask_of(previous)) == 1).all()


def test_adaptive_sampling_survives_terms_that_all_underflow():
    q, k, v = problem()
    k[:, :, 3] = 1e4 * q[:, :1, 0]
    values = add(adaptive(base_rate_sampling=2), (q, k, v))
    assert ((values >= 0) & (values <= 1)).all()


def test_keys_that_are_held_but_not_allowed_are_no_part_of_the_budget():
    """A forbidden key with nearly all of the weight: counted, it would make any error of the others small."""
    q, k, v = problem(num_keys=400)
    k[:, :, 0] = 3 * q[:, :1, 0]
    previous = torch.zeros(1, 2, 1, 400)
    previous[..., 0] = 1
    allowed = (torch.arange(400) > 0).expand(1, 1, 1, 400)
    for attention_mask in (allowed, torch.zeros(1, 1, 1, 400).masked_fill(~allowed, float("-inf"))):
        drawn = add(adaptive(epsilon=0.05), (q, k, v), mask_of(previous), attention_mask)[..., 1:]
        alone = add(adaptive(epsilon=0.05), (q, k[:, :, 1:], v[:, :, 1:]))
        assert (drawn > 0).double().mean() == pytest.approx((alone > 0).double().mean(), rel=0.25)


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_generators_are_optional(generator):
    values = add(adaptive(), problem(), generator=generator)
    assert values.any()


# --- lists of maskers -------------------------------------------------------------------------------------------------


def test_two_samplers_are_refused():
    with pytest.raises(ValueError, match="masker_configs holds 2 samplers, RandomSamplingMasker, MagicPig"):
        attention_of([{"type": "RandomSamplingMasker", "sampling_rate": 0.1}, pig()])
    configs = [attention_of([spec]).maskers[0].config for spec in (pig(), adaptive())]
    config = ResearchAttentionConfig(configs)
    with pytest.raises(ValueError, match="2 samplers"):
        ResearchAttention.create_from_config(config)


def test_two_maskers_of_a_kind_cannot_both_keep_keys():
    chosen = [hash_spec(hash_weights(2, seed=seed)) for seed in (0, 1)]
    attention_of(chosen)
    with pytest.raises(ValueError, match="several HashAttentionTopKMasker with cache_keys"):
        attention_of([spec | {"cache_keys": True} for spec in chosen])


def test_other_types_than_a_config_are_refused():
    with pytest.raises(TypeError, match="a ResearchAttentionConfig"):
        ResearchAttention.create_from_config(SinkMaskerConfig(4))


AROUND = [{"type": "SinkMasker", "sink_size": 4}, local(6)]


@pytest.mark.parametrize(("offsets", "named"), [((4, 6), ""), ((3, 6), "init_offset"), ((4, 0), "local_offset")])
def test_offsets_that_leave_keys_to_nobody_are_warned_of(offsets, named, caplog):
    with caplog.at_level(logging.WARNING):
        attention_of([*AROUND, adaptive(init_offset=offsets[0], local_offset=offsets[1])])
    assert [named in record.getMessage() for record in caplog.records] == ([True] if named else [])


def test_the_order_matters_only_to_rules_that_look():
    tensors = problem(num_queries=3)
    masks = []
    for order in (AROUND, AROUND[::-1]):
        masks.append(attention_of(order).build_mask(*tensors, None, 0.3, 0.0, {}).get_dense_mask())
    assert torch.equal(*masks)


def test_the_module_says_which_layer_it_is_and_whether_it_trains():
    tensors, state = problem(num_keys=300), {}
    module = torch.nn.Module()
    module.layer_idx = 3
    output = attention_of([pig(20, 2)]).custom_attention(module.eval(), *tensors, None, 0.3, 0.5, state)[0]
    assert list(state["projections"]) == [3]
    again = attention_of([pig(20, 2)]).custom_attention(module, *tensors, None, 0.3, 0.0, {}, layer_idx=3)[0]
    assert torch.equal(output, again)
    trained = attention_of([pig(20, 2)]).custom_attention(module.train(), *tensors, None, 0.3, 0.5, {})[0]
    assert not torch.equal(output, trained)


def test_choosing_makes_no_gradients():
    q, k, v = (x.requires_grad_() for x in problem(num_queries=3))
    chosen = [*AROUND, {"type": "OracleTopK", "heavy_size": 2}, pig()]
    mask = attention_of(chosen).build_mask(q, k, v, None, 0.3, 0.0, {}, layer_idx=0)
    assert not mask.get_dense_mask().requires_grad
    output, _ = attention_of(chosen).custom_attention(None, q, k, v, None, 0.3, 0.0, {}, layer_idx=0)
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
