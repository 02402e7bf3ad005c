"""Sparse attention over packed rows: each sample by itself, under the layout's own mask, whoever answers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.testing import assert_close

from flextok.attention.backends import ranged
from flextok.attention.backends.research import MaskStore
from flextok.attention.density import record_density
from flextok.attention.engine import AttentionRequest, record_backends
from flextok.attention.key_intervals import key_intervals
from flextok.attention.layout import layout_of
from flextok.attention.masks import materialize
from flextok.attention.sparse import build_config
from flextok.attention.sparse_plan import LayerMaskers, plan_sparse
from tests.attention.layouts import layout_arguments, random_qkv
from tests.attention.sparse.problems import specs
from tests.attention.sparse.test_geometric_block_masks import geometric_specs

LISTS = {
    "sink and top-k": ["sink", "top_k"],
    "top-p": ["top_p"],
    "hash": ["hash"],
    "magicpig": ["sink", "magic_pig"],
    "random": ["centered", "random"],
    "adaptive": ["sink", "top_k", "adaptive"],
}
LAYOUT = layout_of([[9, 4], [9, 2], [9, 4], [3, 0]], last_counts=(5, 1, 5, 1), total=48)
SEEDS = (11, 12, 13, 14)


def maskers_of(names_or_specs, layer=0):
    every = specs(heads=2)
    chosen = [every[entry] if isinstance(entry, str) else entry for entry in names_or_specs]
    return LayerMaskers(layer, build_config(chosen).masker_configs)


def plan(layout, maskers, backend="auto", **options):
    length = layout.row_length
    request = AttentionRequest(layout, length, length, torch.device("cpu"), torch.float32, False)
    return plan_sparse(request, maskers, backend, **options)


def sample_by_sample(q, k, v, layout, maskers, seeds, *, scale):
    """Every sample's visible tokens through the research path, as a sequence of its own; zeros elsewhere."""
    out, begin = torch.zeros_like(q), 0
    dense, bias = layout.dense_mask(), layout.key_bias(torch.device("cpu"))
    for index, (length, visible) in enumerate(zip(layout.sample_lengths, layout.visible_lengths, strict=True)):
        part = slice(begin, begin + visible)
        begin += length
        if visible:
            mask = torch.zeros(visible, visible) if bias is None else bias[part].expand(visible, visible)
            mask = mask.masked_fill(~dense[part, part], float("-inf"))[None, None]
            generator = torch.Generator().manual_seed(seeds[index] + 1_000_003 * maskers.layer)
            options = {"layer_idx": maskers.layer, "generator": generator}
            some = (x[:, :, part] for x in (q, k, v))
            found, _ = maskers.attention.custom_attention(None, *some, mask, scale, 0.0, {}, **options)
            out[:, :, part] = found.transpose(1, 2)
    return out


@settings(max_examples=25, deadline=None)
@given(arguments=layout_arguments(), masker_specs=geometric_specs, block_size=st.sampled_from([3, 16]))
def test_intervals_are_the_mask_of_each_sample_under_the_layout(arguments, masker_specs, block_size):
    layout = layout_of(**arguments)
    maskers = maskers_of(masker_specs)
    found = key_intervals(layout, maskers.configs)
    size = layout.row_length, layout.row_length
    mask = materialize(found.mask_mod(torch.device("cpu")), 1, 1, *size)[0, 0]
    expected, begin = layout.dense_mask(), 0
    for length, visible in zip(layout.sample_lengths, layout.visible_lengths, strict=True):
        part = slice(begin, begin + visible)
        begin += length
        if visible:
            x = torch.zeros(1, 1, visible, 4)
            of_sample = maskers.attention.build_mask(x, x, x, None, 1.0, 0.0, {}).get_dense_mask()[0, 0] > 0
            expected[part, part] &= of_sample
    assert torch.equal(mask, expected)
    assert found.num_pairs == int(expected.sum())
    if layout.row_length:
        block_mask = found.block_mask(torch.device("cpu"), block_size=block_size)
        evaluated = create_block_mask(block_mask.mask_mod, 1, 1, *size, device="cpu", BLOCK_SIZE=block_size)
        assert torch.equal(block_mask.to_dense(), evaluated.to_dense())


@settings(max_examples=40, deadline=None)
@given(arguments=layout_arguments(), masker_specs=geometric_specs, tile=st.sampled_from([2, 5, 128]))
def test_geometric_lists_are_the_same_by_tiles_and_by_every_score(arguments, masker_specs, tile):
    layout = layout_of(**arguments)
    maskers = maskers_of(masker_specs)
    q, k, v = random_qkv(layout)
    expected = sample_by_sample(q, k, v, layout, maskers, [0] * len(layout.lengths), scale=0.7)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ranged, "TILE", tile)
        for backend in ("sdpa", "reference"):
            assert_close(plan(layout, maskers, backend).attend(q, k, v, 0.7), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["full", "causal_last"])
def test_geometric_lists_are_the_same_by_block_masks(mode):
    layout = LAYOUT if mode == "full" else layout_of([[40, 9], [3, 2], [90, 7]], mode=mode, keep_last=(4, 2, 0))
    maskers = maskers_of(["sink", "centered"])
    q, k, v = random_qkv(layout)
    expected = sample_by_sample(q, k, v, layout, maskers, SEEDS, scale=0.7)
    with torch.no_grad():
        assert_close(plan(layout, maskers, "flex").attend(q, k, v, 0.7), expected, rtol=1e-5, atol=2e-6)


def test_tiles_leave_out_keys_that_nobody_sees(monkeypatch):
    monkeypatch.setattr(ranged, "TILE", 16)
    layout = layout_of([[64]] * 3)
    found = plan(layout, maskers_of([specs(2)["sink"], specs(2)["centered"]]), "sdpa").plan
    assert [tile.keys for tile in found.tiles[0]] == [
        (slice(0, 18),),
        (slice(0, 2), slice(14, 34)),
        (slice(0, 2), slice(30, 50)),
        (slice(0, 2), slice(46, 64)),
    ]


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("mode", ["full", "causal_last", "hidden"])
def test_lists_by_content_act_on_each_sample_by_itself(names, mode):
    layout = LAYOUT
    if mode != "full":
        keep = (3, 1, 3, 0) if mode == "hidden" else None
        layout = layout_of(LAYOUT.lengths, mode="full" if keep else mode, keep_last=keep, total=LAYOUT.total)
    maskers = maskers_of(names, layer=0)
    q, k, v = random_qkv(layout, head_dim=8)
    found = plan(layout, maskers, seeds=SEEDS).attend(q, k, v, 0.7)
    assert_close(found, sample_by_sample(q, k, v, layout, maskers, SEEDS, scale=0.7), rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_what_was_selected():
    q, k, v = random_qkv(LAYOUT, head_dim=8, dtype=torch.float64, requires_grad=True)
    for maskers in (maskers_of(["sink", "centered"]), maskers_of(["sink", "top_k"])):
        ours = torch.autograd.grad(plan(LAYOUT, maskers).attend(q, k, v, 0.7).square().sum(), (q, k, v))
        expected = sample_by_sample(q, k, v, LAYOUT, maskers, SEEDS, scale=0.7).square().sum()
        for found, wanted in zip(ours, torch.autograd.grad(expected, (q, k, v)), strict=True):
            # A bias of float32.
            assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            assert wanted.any()


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
def test_a_store_shares_masks_between_passes_and_knows_each_sample(names):
    first, second = random_qkv(LAYOUT, head_dim=8), [x.flip(2) for x in random_qkv(LAYOUT, head_dim=8)]
    maskers, store = maskers_of(names), MaskStore(every=2)
    fresh = plan(LAYOUT, maskers, seeds=SEEDS).attend(*first, 0.7)
    assert torch.equal(plan(LAYOUT, maskers, seeds=SEEDS, store=store).attend(*first, 0.7), fresh)
    made = {key: values.clone() for key, (_, values) in store.made.items()}
    assert [sample for _, sample in made] == [0, 2, 1, 3]
    store.now = 1
    plan(LAYOUT, maskers, seeds=SEEDS, store=store).attend(*second, 0.7)
    assert all(torch.equal(store.made[key][1], values) for key, values in made.items())
    # One that is new in this pass is made now, and lives as long as the others from now on.
    del store.made[0, 2]
    plan(LAYOUT, maskers, seeds=SEEDS, store=store).attend(*second, 0.7)
    assert {sample: made for (_, sample), (made, _) in store.made.items()} == {0: 0, 1: 0, 2: 1, 3: 0}
    store.now = 2
    anew = plan(LAYOUT, maskers, seeds=SEEDS, store=store).attend(*second, 0.7)
    assert {sample: made for (_, sample), (made, _) in store.made.items()} == {0: 2, 1: 2, 2: 1, 3: 2}
    expected = plan(LAYOUT, maskers, seeds=SEEDS).attend(*second, 0.7)
    if names != LISTS["adaptive"] and names != LISTS["random"]:
        assert_close(anew, expected, rtol=1e-5, atol=1e-6)


def test_density_counts_pairs_of_all_samples():
    with record_density() as density:
        plan(LAYOUT, maskers_of(["centered"])).attend(*random_qkv(LAYOUT, head_dim=8), 1.0)
    pairs = [sum(min(n, i + 3) - max(0, i - 2) for i in range(n)) for n in LAYOUT.sample_lengths]
    assert (density.active, density.allowed) == (2 * sum(pairs), 2 * sum(n * n for n in LAYOUT.sample_lengths))
    with record_density() as density:
        plan(LAYOUT, maskers_of([{"type": "OracleTopK", "heavy_size": 3}])).attend(*random_qkv(LAYOUT), 1.0)
    assert density.active == 2 * 3 * LAYOUT.num_tokens


def test_backends_that_cannot_are_refused_and_the_others_recorded():
    layout = layout_of([[4, 2]])
    for names, backend, reason in (
        (["sink"], "varlen", "its kernels take no mask"),
        (["top_k"], "flex", "by content"),
        (["top_k"], "sdpa", "by content"),
    ):
        with pytest.raises(ValueError, match=f"'{backend}' .*{reason}"):
            plan(layout, maskers_of(names), backend)
    with record_backends() as backends:
        plan(layout, maskers_of(["sink"]))
        plan(layout, maskers_of(["top_k"]))
    assert backends == ["sdpa", "research"]
    q = torch.zeros(1, 2, 6, 8)
    request = AttentionRequest(torch.ones(6, 6).bool(), 6, 6, q.device, q.dtype, False)
    with pytest.raises(ValueError, match="layout of the packed row"):
        plan_sparse(request, maskers_of(["sink"]))
