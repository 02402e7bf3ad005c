"""Every mask means what a plain loop over queries and keys says, in each of the forms it can be evaluated in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flextok.attention import masks
from flextok.attention.layout import SequenceLayout
from flextok.attention.masks import (
    alive_mask,
    and_masks,
    causal_mask,
    causal_positions_mask,
    create_flex_attention_mask,
    create_segment_isolation_mask,
    isolation_adjacency,
    materialize,
    nested_dropout_mask,
    or_masks,
    packed_mask,
    position_window_mask,
    prefix_mask,
    same_sample_mask,
    segment_fusion,
    segment_ids_from_spans,
    symmetric_window_mask,
    trailing_window_mask,
    visible_keys_mask,
)
from flextok.attention.reference import reference_attention
from tests.attention.recorded_segments import segment_cases, segment_tensors

# --- every mask, with arguments drawn at random and the same rule in plain Python -------------------------------------


def rows_of(draw, entries, batch, length):
    """One list for all rows, or one per row, as the tensor a mask takes and as a function `(b, i) -> entry`."""
    if draw(st.booleans()):
        row = draw(st.lists(entries, min_size=length, max_size=length))
        return torch.tensor(row), lambda b, i: row[i]
    rows = draw(st.lists(st.lists(entries, min_size=length, max_size=length), min_size=batch, max_size=batch))
    return torch.tensor(rows), lambda b, i: rows[b][i]


def numbers_of(draw, entries, batch):
    """One number for all rows, or one per row, as a tensor and as a function `b -> number`."""
    if draw(st.booleans()):
        number = draw(entries)
        return torch.tensor(number), lambda b: number
    numbers = draw(st.lists(entries, min_size=batch, max_size=batch))
    return torch.tensor(numbers), lambda b: numbers[b]


def draw_causal(draw, batch, length):
    return causal_mask(), lambda b, q, k: k <= q


def draw_causal_positions(draw, batch, length):
    table, position = rows_of(draw, st.integers(0, 5), batch, length)
    return causal_positions_mask(table), lambda b, q, k: position(b, k) <= position(b, q)


def draw_prefix(draw, batch, length):
    table, prefix = numbers_of(draw, st.integers(0, length + 1), batch)
    return prefix_mask(table), lambda b, q, k: k < prefix(b) or k <= q


def draw_visible_keys(draw, batch, length):
    table, visible = rows_of(draw, st.booleans(), batch, length)
    return visible_keys_mask(table), lambda b, q, k: visible(b, k)


def draw_same_sample(draw, batch, length):
    table, sample = rows_of(draw, st.integers(-1, 2), batch, length)
    return same_sample_mask(table), lambda b, q, k: sample(b, q) == sample(b, k) != -1


def draw_nested_dropout(draw, batch, length):
    table, keep_k = numbers_of(draw, st.integers(0, length + 1), batch)
    before = draw(st.integers(0, length))
    return nested_dropout_mask(table, before), lambda b, q, k: max(q, k) < before + keep_k(b)


def draw_alive(draw, batch, length):
    table, alive = rows_of(draw, st.booleans(), batch, length)
    return alive_mask(table), lambda b, q, k: alive(b, q) and alive(b, k)


def draw_trailing_window(draw, batch, length):
    window = draw(st.integers(1, length + 1))
    return trailing_window_mask(window), lambda b, q, k: k in range(q - window + 1, q + 1)


def draw_symmetric_window(draw, batch, length):
    radius = draw(st.integers(0, length + 1))
    return symmetric_window_mask(radius), lambda b, q, k: abs(q - k) <= radius


def draw_position_window(draw, batch, length):
    table, position = rows_of(draw, st.integers(0, 9), batch, length)
    window = draw(st.integers(1, 9))
    return position_window_mask(table, window), lambda b, q, k: position(b, q) - position(b, k) < window


def draw_packed(draw, batch, length):
    sample, sample_of = rows_of(draw, st.integers(-1, 2), batch, length)
    position, position_of = rows_of(draw, st.integers(0, 5), batch, length)
    before_last, is_before = rows_of(draw, st.booleans(), batch, length)
    mode = draw(st.sampled_from(["full", "causal", "causal_last"]))

    def rule(b, q, k):
        earlier = position_of(b, k) <= position_of(b, q)
        ordered = {"full": True, "causal": earlier, "causal_last": earlier or is_before(b, k)}[mode]
        return sample_of(b, q) == sample_of(b, k) != -1 and ordered

    return packed_mask(sample, position, before_last, mode=mode), rule


def draw_segment_fusion(draw, batch, length):
    prompt = draw(st.integers(1, length))  # what is left of the row was generated
    table, segment = rows_of(draw, st.integers(-1, 2), batch, prompt)
    start, fusion_start = numbers_of(draw, st.integers(0, prompt), batch)
    valid, is_valid = rows_of(draw, st.booleans(), batch, prompt) if draw(st.booleans()) else (None, lambda b, i: True)
    open_to = draw(st.none() | st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=3, max_size=3))
    gap_rows, gap_keys = draw(st.sampled_from(["self", "masked"])), draw(st.sampled_from(["visible", "hidden"]))

    def segment_at(b, i):
        return segment(b, i) if i < prompt else -1

    def valid_at(b, i):
        return i >= prompt or is_valid(b, i)

    def rule(b, q, k):
        s_q, s_k, joined_from = segment_at(b, q), segment_at(b, k), fusion_start(b)
        sees = min(s_q, s_k) >= 0 and (s_q == s_k if open_to is None else open_to[s_q][s_k])
        encode = q < joined_from and k < joined_from and sees
        fuse = q >= joined_from and valid_at(b, q) and (gap_keys == "visible" or k >= joined_from or s_k >= 0)
        return (k <= q and valid_at(b, k) and (encode or fuse)) or (gap_rows == "self" and q == k)

    adjacency = None if open_to is None else torch.tensor(open_to)
    mask = segment_fusion(table, start, adjacency=adjacency, gap_rows=gap_rows, gap_keys=gap_keys, valid=valid)
    return mask, rule


SIMPLE = (draw_causal, draw_prefix, draw_same_sample, draw_nested_dropout, draw_symmetric_window)
EVERY = (
    *SIMPLE,
    draw_causal_positions,
    draw_visible_keys,
    draw_alive,
    draw_trailing_window,
    draw_position_window,
    draw_packed,
    draw_segment_fusion,
)


def draw_and(draw, batch, length):
    parts = [draw(st.sampled_from(SIMPLE))(draw, batch, length) for _ in range(draw(st.integers(1, 3)))]
    return and_masks(*[mask for mask, _ in parts]), lambda b, q, k: all(rule(b, q, k) for _, rule in parts)


def draw_or(draw, batch, length):
    parts = [draw(st.sampled_from((*SIMPLE, draw_and)))(draw, batch, length) for _ in range(draw(st.integers(1, 3)))]
    return or_masks(*[mask for mask, _ in parts]), lambda b, q, k: any(rule(b, q, k) for _, rule in parts)


by_mask = pytest.mark.parametrize("draw_mask", [*EVERY, draw_and, draw_or], ids=lambda draw: draw.__name__[5:])


def looped(rule, batch, length):
    index = range(length)
    return torch.tensor([[[bool(rule(b, q, k)) for k in index] for q in index] for b in range(batch)])


@by_mask
@given(data=st.data())
def test_a_mask_equals_its_rule_by_vmap_and_by_broadcasting(draw_mask, data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    mask, rule = draw_mask(data.draw, batch, length)
    expected = looped(rule, batch, length)
    heads = 2
    dense = materialize(mask, batch, heads, length, length)
    assert dense.shape == (batch, heads, length, length)
    assert dense.dtype == torch.bool
    assert torch.equal(dense, expected[:, None].expand_as(dense))
    index = torch.arange(length)
    broadcast = mask(torch.arange(batch)[:, None, None], torch.tensor(0), index[:, None], index)
    assert torch.equal(broadcast.expand_as(expected), expected)
    # Plain numbers for batch and head serve as well as tensors.
    assert torch.equal(mask(batch - 1, 0, index[:, None], index).expand_as(expected[-1]), expected[-1])


@by_mask
@given(data=st.data())
def test_block_masks_hold_the_same_elements(draw_mask, data):
    batch, length = data.draw(st.integers(1, 2)), 40
    mask, rule = draw_mask(data.draw, batch, length)
    blocks = create_block_mask(mask, batch, None, length, length, device="cpu", BLOCK_SIZE=16)
    padded = torch.nn.functional.pad(looped(rule, batch, length), (0, 8, 0, 8))
    occupied = padded.view(batch, 3, 16, 3, 16).any(dim=(2, 4))
    assert torch.equal(blocks.to_dense()[:, 0].bool(), occupied)
    assert torch.equal(materialize(blocks.mask_mod, batch, None, length, length)[:, 0], looped(rule, batch, length))


def test_the_catalogue_is_complete():
    assert sorted(masks.__all__) == masks.__all__
    assert all(hasattr(masks, name) for name in masks.__all__)


# --- what masks mean together -----------------------------------------------------------------------------------------


def test_masks_of_a_packed_row_are_composed_of_simple_ones():
    """Two samples of `[2 patches | 3 registers]`, of which 1 and 2 registers are kept."""
    layout = SequenceLayout(((2, 3), (2, 3)), mode="causal_last", keep_last=(1, 2))
    sample = torch.tensor([0] * 5 + [1] * 5)
    patches = torch.tensor([True, True, False, False, False] * 2)
    kept = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1, 1, 0]).bool()
    order = or_masks(causal_mask(), visible_keys_mask(patches))
    composed = and_masks(same_sample_mask(sample), alive_mask(kept), order)
    assert torch.equal(materialize(composed, 1, 1, 10, 10)[0, 0], layout.dense_mask())


@pytest.mark.parametrize("keep_k", [0, 1, 2, 3])
def test_nested_dropout_of_a_batch_is_that_of_its_samples(keep_k):
    """Rows of a batch, packed rows and layouts agree on who is dropped."""
    in_batch = materialize(nested_dropout_mask(torch.tensor([keep_k, 3]), num_before=2), 2, 1, 5, 5)[:, 0]
    alone = SequenceLayout(((2, 3),), keep_last=(keep_k,)).dense_mask()
    assert torch.equal(in_batch[0], alone)
    assert in_batch[1].all()


def test_a_trailing_window_is_the_causal_half_of_a_symmetric_one():
    trailing = materialize(trailing_window_mask(3), 1, 1, 8, 8)
    assert torch.equal(trailing, materialize(and_masks(causal_mask(), symmetric_window_mask(2)), 1, 1, 8, 8))


def test_masks_need_not_be_square():
    assert materialize(causal_mask(), None, None, 2, 4).int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0]]]]


# --- segments ---------------------------------------------------------------------------------------------------------

each_case = pytest.mark.parametrize("case", segment_cases(), ids=lambda case: case["name"])


@each_case
def test_recorded_segment_ids(case):
    ids = segment_ids_from_spans(case["spans"], case["length"])
    assert ids.dtype == torch.int64
    assert torch.equal(ids, segment_tensors()[f"{case['name']}.segment_ids"])


@each_case
@pytest.mark.parametrize("gap_rows", ["self", "masked"])
@pytest.mark.parametrize("gap_keys", ["visible", "hidden"])
def test_recorded_masks(case, gap_rows, gap_keys):
    recorded, name, total = segment_tensors(), case["name"], case["total"]
    mask = segment_fusion(
        recorded[f"{name}.segment_ids"],
        case["fusion_start"],
        adjacency=recorded[f"{name}.adjacency"],
        gap_rows=gap_rows,
        gap_keys=gap_keys,
    )
    expected = recorded[f"{name}.mask.{gap_rows}.{gap_keys}"]
    assert torch.equal(materialize(mask, 1, 1, total, total)[0, 0], expected)


def test_recorded_batch_of_padded_rows():
    recorded = segment_tensors()
    expected = recorded["batch.mask"]
    mask = segment_fusion(recorded["batch.segment_ids"], recorded["batch.fusion_start"], valid=recorded["batch.valid"])
    assert torch.equal(materialize(mask, *expected.shape[:1], 1, *expected.shape[1:])[:, 0], expected)


@pytest.mark.parametrize("create", [create_flex_attention_mask, create_segment_isolation_mask])
@pytest.mark.parametrize("name", ["abutting", "separated", "single", "one_token", "leading_gap_tail", "seed_248"])
def test_isolated_segments_by_their_spans(create, name):
    case = next(case for case in segment_cases() if case["name"] == name)
    expected = segment_tensors()[f"{name}.mask.masked.visible"]
    mask = create(case["spans"], case["fusion_start"])
    assert torch.equal(materialize(mask, 1, 1, *expected.shape)[0, 0], expected)


@pytest.mark.parametrize("name", ["abutting", "separated", "shared_prefix"])
def test_recorded_adjacency(name):
    expected = segment_tensors()[f"{name}.adjacency"]
    assert torch.equal(isolation_adjacency(len(expected), shared_prefix=name == "shared_prefix"), expected)


def test_no_adjacency_is_that_of_isolation():
    ids = torch.tensor([0, 0, 1, -1, 2, 2])
    dense = [
        materialize(segment_fusion(ids, 6, adjacency=adjacency), 1, 1, 8, 8)
        for adjacency in (None, isolation_adjacency(3))
    ]
    assert torch.equal(*dense)


def test_a_segment_is_attended_to_as_if_it_were_alone():
    spans, length = [(0, 5), (5, 8), (10, 16)], 16
    q, k, v = torch.randn(3, 1, 2, length, 8).unbind()
    mask = create_flex_attention_mask(spans, length)
    together = reference_attention(q, k, v, materialize(mask, 1, 1, length, length), scale=1.0)
    for start, end in spans:
        q_alone, k_alone, v_alone = (x[:, :, start:end] for x in (q, k, v))
        causal = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        alone = reference_attention(q_alone, k_alone, v_alone, causal, scale=1.0)
        torch.testing.assert_close(together[:, :, start:end], alone, atol=1e-5, rtol=0)
    blocks = create_block_mask(mask, None, None, length, length, device="cpu")
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=blocks, scale=1.0), together, atol=1e-5, rtol=0)


# --- mistakes ---------------------------------------------------------------------------------------------------------

IDS = torch.tensor([0, 0, 1, 1, -1])
FLOATS = torch.ones(3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: segment_ids_from_spans([], 4), "spans=.*at least one"),
        (lambda: segment_ids_from_spans([(0, 2), (2, 2)], 4), r"spans\[1\]=\(2, 2\)"),
        (lambda: segment_ids_from_spans([(-1, 2)], 4), r"spans\[0\]=\(-1, 2\)"),
        (lambda: segment_ids_from_spans([(2, 5)], 4), "length 4"),
        (lambda: segment_ids_from_spans([(0, 3), (2, 4)], 4), r"spans\[1\]=\(2, 4\) overlaps spans\[0\]"),
        (lambda: segment_ids_from_spans([(2, 4), (0, 3)], 4), "overlaps"),
        (lambda: create_flex_attention_mask([(0, 3)], 2), "length 2"),
        (lambda: isolation_adjacency(0), "n=0"),
        (lambda: segment_fusion(IDS, 5, gap_rows="none"), "gap_rows='none'.*self, masked"),
        (lambda: segment_fusion(IDS, 5, gap_keys="seen"), "gap_keys='seen'.*visible, hidden"),
        (lambda: segment_fusion(IDS, 6), "fusion_start=6; valid: 0 to 5"),
        (lambda: segment_fusion(IDS, -1), "fusion_start=-1"),
        (lambda: segment_fusion(IDS[:0], 0), "segment_ids is empty"),
        (lambda: segment_fusion(IDS.float(), 5), "segment_ids is of torch.float32"),
        (lambda: segment_fusion(IDS[None, None], 5), r"segment_ids has shape \[1, 1, 5\]"),
        (lambda: segment_fusion(IDS, 5, adjacency=isolation_adjacency(1)), "segment_ids go up to 1.*the 1 rows"),
        (lambda: segment_fusion(IDS, 5, adjacency=torch.eye(2)), "adjacency is of torch.float32"),
        (lambda: segment_fusion(IDS, 5, adjacency=torch.ones(2, 3).bool()), r"adjacency has shape \[2, 3\]"),
        (lambda: segment_fusion(IDS, 5, valid=torch.ones(4).bool()), "valid covers 4 tokens; valid: the 5"),
        (lambda: segment_fusion(IDS.expand(2, 5), torch.tensor([1, 2, 3])), r"batches of \[2, 3\]"),
        (lambda: and_masks(), "and_masks got nothing"),
        (lambda: or_masks(causal_mask(), 3), "or_masks got 3"),
        (lambda: trailing_window_mask(0), "window=0"),
        (lambda: symmetric_window_mask(-1), "radius=-1"),
        (lambda: position_window_mask(IDS, 0), "window=0"),
        (lambda: position_window_mask(FLOATS, 2), "positions is of torch.float32"),
        (lambda: nested_dropout_mask(torch.tensor([1]), -1), "num_before=-1"),
        (lambda: nested_dropout_mask(FLOATS, 1), "keep_k is of torch.float32"),
        (lambda: prefix_mask(torch.tensor([[1]])), r"prefix_length has shape \[1, 1\]"),
        (lambda: same_sample_mask(torch.tensor(1)), r"sample has shape \[\]"),
        (lambda: alive_mask(torch.tensor([1, 0])), "alive is of torch.int64; valid: bool"),
        (lambda: visible_keys_mask(FLOATS), "visible is of torch.float32"),
        (lambda: packed_mask(IDS, IDS, IDS > 0, mode="fool"), "mode='fool'.*full, causal, causal_last"),
    ],
)
def test_mistakes_name_the_field_and_what_is_valid(build, message):
    with pytest.raises(ValueError, match=message):
        build()
