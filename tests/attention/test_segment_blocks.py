"""Block masks of segments are those found by evaluating the mask everywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from flextok.attention.masks import isolation_adjacency, segment_fusion, segment_ids_from_spans
from flextok.attention.segment_blocks import segment_block_mask

LISTS = ("kv", "full_kv", "q", "full_q")


def found(block_mask, name):
    """Per batch and block, the indices of its partners."""
    counts = getattr(block_mask, f"{name}_num_blocks")
    indices = getattr(block_mask, f"{name}_indices")
    return [
        [row[:count] for row, count in zip(rows[0].tolist(), of_rows[0].tolist(), strict=True)]
        for rows, of_rows in zip(indices, counts, strict=True)
    ]


@st.composite
def segment_arguments(draw):
    length, num_segments = draw(st.integers(1, 40)), draw(st.integers(1, 4))

    def row():
        runs = st.lists(st.tuples(st.integers(-1, num_segments - 1), st.integers(1, 9)), min_size=1)
        ids = [number for number, count in draw(runs) for _ in range(count)]
        return (ids * length)[:length]

    def flags():
        return draw(st.lists(st.booleans(), min_size=length, max_size=length))

    batch = draw(st.sampled_from([None, 1, 3]))
    ids = torch.tensor(row() if batch is None else [row() for _ in range(batch)])
    start = draw(st.integers(0, length))
    if batch is not None and draw(st.booleans()):
        start = torch.tensor([draw(st.integers(0, length)) for _ in range(batch)])
    adjacency = valid = None
    if draw(st.booleans()):
        cells = st.lists(st.booleans(), min_size=num_segments, max_size=num_segments)
        adjacency = torch.tensor([draw(cells) for _ in range(num_segments)])
    if draw(st.booleans()):
        valid = torch.tensor(flags() if batch is None else [flags() for _ in range(batch)])
    gap_keys = draw(st.sampled_from(["visible", "hidden"]))
    return (ids, start), {"adjacency": adjacency, "gap_keys": gap_keys, "valid": valid}


@given(arguments=segment_arguments(), block_size=st.sampled_from([1, 3, 4, 16, 128]))
def test_lists_are_those_of_the_whole_matrix(arguments, block_size):
    (ids, start), options = arguments
    length, batch = ids.shape[-1], ids.shape[0] if ids.ndim == 2 else None
    made = segment_block_mask(ids, start, block_size=block_size, **options)
    mask_mod = segment_fusion(ids, start, **options)
    expected = create_block_mask(mask_mod, batch, None, length, length, device="cpu", BLOCK_SIZE=block_size)
    assert made.shape == expected.shape
    assert torch.equal(made.to_dense(), expected.to_dense())
    for name in LISTS:
        assert found(made, name) == found(expected, name)


def test_a_long_prompt_needs_no_matrix_of_its_tokens():
    """10^5 tokens: the matrix would have 10^10 entries."""
    spans = [(0, 500), *((500 + 20_000 * n, 500 + 20_000 * (n + 1)) for n in range(5))]
    ids = segment_ids_from_spans(spans, 100_600)
    made = segment_block_mask(ids, 100_500, adjacency=isolation_adjacency(6, shared_prefix=True))
    assert made.shape == (1, 1, 100_600, 100_600)
    # Little more than a fifth of the lower triangle: five wordings of equal length.
    assert 0.1 < 1 - made.sparsity() / 100 < 0.115


def test_a_block_size_that_makes_no_sense():
    with pytest.raises(ValueError, match="block_size=0; valid: 1 token or more"):
        segment_block_mask(torch.zeros(4, dtype=torch.long), 2, block_size=0)
