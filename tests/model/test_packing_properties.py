"""Packing loses nothing: unpack undoes pack, unpatchify undoes patchify, embeddings find their tokens."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.model.postprocessors.heads import unpatchify
from flextok.model.postprocessors.seq_unpacking import SequenceUnpacker
from flextok.model.preprocessors.flex_seq_packing import BlockWiseSequencePacker
from flextok.model.preprocessors.nested_dropout_seq_packer import NestedDropoutSequencePacker
from flextok.model.preprocessors.patching import patchify
from tests.support import Untouched

WIDTH = 3
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def batches(draw):
    """Per input key a list of sample shapes without batch and width; half of the batches are uniform."""
    num_keys, num_samples = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return [[draw(shapes)] * num_samples for _ in range(num_keys)]
    return [[draw(shapes) for _ in range(num_samples)] for _ in range(num_keys)]


def random_inputs(batch):
    return {
        f"in{key}": [torch.randn(1, *shape, WIDTH) for shape in sample_shapes]
        for key, sample_shapes in enumerate(batch)
    }


def make_packer(num_keys, packer=BlockWiseSequencePacker, **kwargs):
    return packer(
        input_list_read_keys=[f"in{i}" for i in range(num_keys)],
        packed_seq_write_key="sequence",
        block_mask_write_key="mask",
        inner_packed_shapes_write_key="inner",
        outer_packed_shapes_write_key="outer",
        emb_packing_fn_write_key="pack_emb",
        **kwargs,
    )


def make_unpacker(num_keys):
    return SequenceUnpacker(
        packed_seq_read_key="sequence",
        inner_seq_write_keys=[f"out{i}" for i in range(num_keys)],
        inner_packed_shapes_read_key="inner",
        outer_packed_shapes_read_key="outer",
    )


def assert_same_lists(data, num_keys):
    for key in range(num_keys):
        assert len(data[f"out{key}"]) == len(data[f"in{key}"])
        for before, after in zip(data[f"in{key}"], data[f"out{key}"], strict=True):
            assert torch.equal(before, after)


@given(batches(), st.sampled_from([None, 1, 7, 128]))
def test_unpacking_undoes_packing(batch, multiple):
    data = random_inputs(batch)
    untouched = Untouched(data)
    packed = make_packer(len(batch), pad_to_multiple=multiple)(data)
    num_tokens = sum(math.prod(shape) for sample_shapes in batch for shape in sample_shapes)
    row_length = math.ceil(num_tokens / (multiple or 1)) * (multiple or 1)
    assert packed["sequence"].shape == (1, row_length, WIDTH)
    assert (packed["sequence"][:, num_tokens:] == 0).all()
    unpacked = make_unpacker(len(batch))(packed)
    assert_same_lists(unpacked, len(batch))
    untouched.check()


@given(batches(), st.integers(0, 9))
def test_a_row_of_fixed_length_is_unpacked_too(batch, spare):
    num_tokens = sum(math.prod(shape) for sample_shapes in batch for shape in sample_shapes)
    data = make_packer(len(batch), max_seq_len=num_tokens + spare)(random_inputs(batch))
    assert data["sequence"].shape == (1, num_tokens + spare, WIDTH)
    assert_same_lists(make_unpacker(len(batch))(data), len(batch))


@given(batches())
def test_samples_lie_one_after_another_each_with_its_sub_sequences_in_order(batch):
    data = make_packer(len(batch))(random_inputs(batch))
    rows = [data[f"in{key}"][sample].reshape(-1, WIDTH) for sample in range(len(batch[0])) for key in range(len(batch))]
    assert torch.equal(data["sequence"][0], torch.cat(rows))
    lengths = [sum(math.prod(keys[i]) for keys in batch) for i in range(len(batch[0]))]
    assert [tuple(shape) for shape in data["outer"]] == [(n,) for n in lengths]
    assert [[tuple(s) for s in sample] for sample in data["inner"]] == [
        [keys[i] for keys in batch] for i in range(len(batch[0]))
    ]


@given(batches(), st.booleans(), st.sampled_from([None, 128]))
def test_embeddings_reach_the_tokens_of_their_sub_sequence(batch, per_subsequence, multiple):
    data = make_packer(len(batch), per_subseq_embs=per_subsequence, pad_to_multiple=multiple)(random_inputs(batch))
    num_samples, chunks = len(batch[0]), len(batch) if per_subsequence else 1
    emb = torch.randn(num_samples, chunks * 5)
    rows = [
        emb[sample].view(chunks, 5)[key if per_subsequence else 0].expand(math.prod(batch[key][sample]), 5)
        for sample in range(num_samples)
        for key in range(len(batch))
    ]
    assert torch.equal(torch.as_tensor(data["pack_emb"](emb)), torch.cat(rows)[None])


@given(batches(), st.data())
def test_unpacking_undoes_the_nested_dropout_packer(batch, data):
    """Also when dropped tokens are left out: kept ones come back, the rows of dropped ones are finite."""
    lists = [[(math.prod(shape),) for shape in batch[-1]]]
    batch = [*batch[:-1], *lists]
    keep = [data.draw(st.integers(1, shape[0] + 2)) for shape in batch[-1]]
    for drop_masked in (False, True):
        packer = make_packer(len(batch), NestedDropoutSequencePacker, drop_masked=drop_masked)
        out = make_unpacker(len(batch))(packer({**random_inputs(batch), "nested_dropout_keep_k": keep}))
        last = len(batch) - 1
        for before, after, keep_k in zip(out[f"in{last}"], out[f"out{last}"], keep, strict=True):
            assert before.shape == after.shape
            assert torch.equal(before[:, :keep_k], after[:, :keep_k])
            assert torch.isfinite(after).all()
        for key in range(last):
            for before, after in zip(out[f"in{key}"], out[f"out{key}"], strict=True):
                assert torch.equal(before, after)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3), st.booleans())
def test_unpatchify_undoes_patchify_in_one_to_three_dimensions(axes, is_tuple):
    counts, patch_sizes = [n for n, _ in axes], [p for _, p in axes]
    x = torch.randn(2, *[n * p for n, p in axes], WIDTH)
    given_sizes = tuple(patch_sizes) if is_tuple else patch_sizes
    patches, num_patches = patchify(x, given_sizes)
    assert patches.shape == (2, *counts, math.prod(patch_sizes) * WIDTH)
    assert list(num_patches) == counts
    assert torch.equal(unpatchify(patches, given_sizes), x)
    flat, _ = patchify(x, given_sizes, flatten_patches=True)
    assert torch.equal(flat, patches.flatten(1, -2))


def test_patch_features_run_over_rows_columns_then_channels():
    x = torch.arange(4 * 4 * 2).view(1, 4, 4, 2)
    patches, _ = patchify(x, [2, 2])
    assert torch.equal(patches[0, 1, 0], x[0, 2:4, 0:2].flatten())
