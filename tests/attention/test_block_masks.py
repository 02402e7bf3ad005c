"""An analytic block mask is the one `create_block_mask` finds by evaluating the mask everywhere, list by list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flextok.attention.block_masks import block_mask_of, packed_block_mask
from flextok.attention.layout import SequenceLayout

CPU = torch.device("cpu")
LISTS = ("kv", "full_kv", "q", "full_q")


@st.composite
def layout_arguments(draw, longest):
    """Several sub-sequences, zero-length ones too, hidden tokens, padding; samples shorter and longer than a block."""
    length = st.one_of(st.just(0), st.integers(0, 4), st.integers(0, longest))
    one_sample = st.tuples(*[length] * draw(st.integers(1, 3)))
    lengths = draw(st.lists(one_sample, min_size=1, max_size=6).filter(lambda samples: any(map(any, samples))))
    keep_last = draw(st.none() | st.tuples(*[st.integers(0, longest)] * len(lengths)))
    padding = draw(st.none() | st.integers(0, longest))
    total = None if padding is None else sum(map(sum, lengths)) + padding
    mode = draw(st.sampled_from(["full", "causal", "causal_last"]))
    return {"lengths": tuple(lengths), "mode": mode, "keep_last": keep_last, "total": total}


def evaluated(layout, block_size, device=CPU):
    length = layout.row_length
    return create_block_mask(layout.mask_mod(device), None, None, length, length, device=device, BLOCK_SIZE=block_size)


def valid_entries(block_mask, name):
    """Counts, and the entries of the indices that mean something."""
    counts = getattr(block_mask, f"{name}_num_blocks")
    indices = getattr(block_mask, f"{name}_indices")
    return counts, indices[torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]]


def assert_same_block_mask(actual, expected):
    assert actual.shape == expected.shape
    assert actual.seq_lengths == expected.seq_lengths
    assert actual.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in LISTS:
        for mine, theirs in zip(valid_entries(actual, name), valid_entries(expected, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        # Kernels read strides and lengths off the tensors, so their form counts as much as their values.
        mine, theirs = (getattr(x, f"{name}_indices") for x in (actual, expected))
        assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert torch.equal(actual.to_dense(), expected.to_dense())


@pytest.mark.parametrize("block_size", [1, 4, 8, 16])
@settings(max_examples=60)
@given(arguments=layout_arguments(longest=40))
def test_lists_equal_those_of_create_block_mask(block_size, arguments):
    layout = SequenceLayout(**arguments)
    assert_same_block_mask(packed_block_mask(layout, CPU, block_size=block_size), evaluated(layout, block_size))


@settings(max_examples=20)
@given(arguments=layout_arguments(longest=300))
def test_lists_equal_those_of_create_block_mask_with_blocks_of_128(arguments):
    layout = SequenceLayout(**arguments)
    assert_same_block_mask(packed_block_mask(layout, CPU), evaluated(layout, 128))


@given(arguments=layout_arguments(longest=20))
def test_full_blocks_hold_only_visible_pairs_and_unlisted_ones_none(arguments):
    layout = SequenceLayout(**arguments)
    block_mask = packed_block_mask(layout, CPU, block_size=4)
    missing = -layout.row_length % 4
    pairs = torch.nn.functional.pad(layout.dense_mask(), (0, missing, 0, missing))
    visible = pairs.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).float().mean((1, 3))
    full = BlockMask.from_kv_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices).to_dense()[0, 0]
    partial = BlockMask.from_kv_blocks(block_mask.kv_num_blocks, block_mask.kv_indices).to_dense()[0, 0]
    assert torch.equal(full.bool(), visible == 1)
    assert torch.equal(partial.bool(), (visible > 0) & (visible < 1))


def test_a_small_case_written_out():
    """Blocks of 2; a sample of 2 patches and 3 registers, 2 of them kept, then one of 2 patches and 1 register."""
    layout = SequenceLayout(((2, 3), (2, 1)), mode="causal_last", keep_last=(2, 1), total=10)
    block_mask = packed_block_mask(layout, CPU, block_size=2)
    counts = {name: getattr(block_mask, f"{name}_num_blocks").flatten().tolist() for name in LISTS}
    entries = {name: valid_entries(block_mask, name)[1].tolist() for name in LISTS}
    # Queries 0-1 see keys 0-1; 2-3 see 0-1, and 2-3 in order; 4 is hidden; 5-7 see 5 and 6, the last one all three.
    assert counts == {
        "kv": [0, 1, 2, 2, 0],
        "full_kv": [1, 1, 0, 0, 0],
        "q": [0, 1, 2, 2, 0],
        "full_q": [2, 0, 0, 0, 0],
    }
    assert entries == {"kv": [1, 2, 3, 2, 3], "full_kv": [0, 0], "q": [1, 2, 3, 2, 3], "full_q": [0, 1]}
    # Kernels load the first entry of an empty list and may look past the end of others: there must be a block there.
    assert block_mask.kv_indices[0, 0].tolist() == [[0] * 5, [1, 0, 0, 0, 0], [2, 3, 0, 0, 0], [2, 3, 0, 0, 0], [0] * 5]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256])
@pytest.mark.parametrize("mode", ["full", "causal", "causal_last"])
def test_one_sample_around_the_size_of_a_block(length, mode):
    layout = SequenceLayout(((length - length // 2, length // 2),), mode=mode)
    assert_same_block_mask(packed_block_mask(layout, CPU), evaluated(layout, 128))


@pytest.mark.parametrize("lengths", [((0, 9), (0, 3)), ((0,),)])
def test_a_row_without_visible_tokens_has_no_blocks(lengths):
    layout = SequenceLayout(lengths, keep_last=(0,) * len(lengths), total=20)
    block_mask = packed_block_mask(layout, CPU, block_size=4)
    assert_same_block_mask(block_mask, evaluated(layout, 4))
    assert not block_mask.to_dense().any()


@given(arguments=layout_arguments(longest=20))
def test_without_queries_the_key_lists_are_the_same(arguments):
    layout = SequenceLayout(**arguments)
    without = packed_block_mask(layout, CPU, block_size=4, with_queries=False)
    assert all(getattr(without, f"{name}_{part}") is None for name in LISTS[2:] for part in ("num_blocks", "indices"))
    derived = BlockMask.from_kv_blocks(
        without.kv_num_blocks,
        without.kv_indices,
        without.full_kv_num_blocks,
        without.full_kv_indices,
        BLOCK_SIZE=without.BLOCK_SIZE,
        seq_lengths=without.seq_lengths,
    )
    assert_same_block_mask(packed_block_mask(layout, CPU, block_size=4), derived)


@pytest.mark.parametrize(("block_size", "total"), [(0, 8), (-128, 8), (128, 0)])
def test_a_row_or_a_block_of_no_tokens_is_refused(block_size, total):
    with pytest.raises(ValueError, match=f"a row of {total} tokens has no blocks of {block_size}"):
        packed_block_mask(SequenceLayout(((total,),)), CPU, block_size=block_size)


def test_slices_and_copies_keep_the_lists():
    layout = SequenceLayout(((10, 9), (3, 0), (7, 30)), mode="causal_last", keep_last=(4, 0, 20))
    block_mask, expected = packed_block_mask(layout, CPU, block_size=8), evaluated(layout, 8)
    assert_same_block_mask(block_mask[0:1, 0:1], expected)
    assert_same_block_mask(block_mask.to("cpu"), expected)
    assert torch.equal(
        block_mask[0, 0, torch.tensor([1, 3])].to_dense(), expected[0, 0, torch.tensor([1, 3])].to_dense()
    )
    assert block_mask.sparsity() == expected.sparsity()
    assert str(block_mask) == str(expected)
    assert [type(x) for x in block_mask.as_tuple()] == [type(x) for x in expected.as_tuple()]


def random_qkv(layout, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 2, layout.row_length, 16, generator=generator).to(device)


LAYOUTS_TO_ATTEND = [
    SequenceLayout(((150, 40), (20, 0), (64, 64)), mode="full", keep_last=(10, 0, 64), total=400),
    SequenceLayout(((100, 130), (3, 3)), mode="causal"),
    SequenceLayout(((300, 60), (0, 50)), mode="causal_last", keep_last=(20, 50)),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", LAYOUTS_TO_ATTEND, ids=lambda layout: layout.mode)
def test_uncompiled_attention_is_the_same_under_both_masks(layout):
    qkv = random_qkv(layout, CPU)
    out = flex_attention(*qkv, block_mask=packed_block_mask(layout, CPU))
    assert torch.equal(out, flex_attention(*qkv, block_mask=evaluated(layout, 128)))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS_TO_ATTEND, ids=lambda layout: layout.mode)
def test_compiled_attention_and_its_gradients_are_the_same_under_both_masks(layout):
    cuda, compiled = torch.device("cuda"), torch.compile(flex_attention)
    results = []
    for block_mask in (packed_block_mask(layout, cuda), evaluated(layout, 128, cuda)):
        qkv = random_qkv(layout, cuda).requires_grad_()
        out = compiled(*qkv.unbind(), block_mask=block_mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_any_mask_function_gets_its_block_mask():
    window = torch.tensor([3, 9])

    def trailing_window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window[b])

    block_mask = block_mask_of(trailing_window, 50, 70, CPU, batch=2, heads=3, block_size=8)
    assert block_mask.shape == (2, 3, 50, 70)
    assert_same_block_mask(block_mask, create_block_mask(trailing_window, 2, 3, 50, 70, device="cpu", BLOCK_SIZE=8))


@pytest.mark.gpu
def test_any_mask_function_gets_its_block_mask_compiled():
    cuda = torch.device("cuda")
    for layout in LAYOUTS_TO_ATTEND:
        length = layout.row_length
        assert_same_block_mask(block_mask_of(layout.mask_mod(cuda), length, length, cuda), evaluated(layout, 128, cuda))
