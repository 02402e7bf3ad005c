"""`Mask`: states, values, what is refused."""

import pytest
import torch
from torch.testing import assert_close

from flextok.attention.sparse import Mask, masked_attention

SHAPE = (1, 2, 2, 3)
VALUES = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.25, 0.0, 1.0]]).reshape(SHAPE)


def dense(values, dtype=torch.float32):
    return Mask.create_mask_from_dense_mask(values.shape, values, dtype)


def row_wise(columns, data=None, shape=(2, 4), mask_type="index", **options):
    return Mask.create_from_row_wise_idx(shape, torch.tensor(columns), data, mask_type, torch.float32, **options)


def rows(indices, ptr, data=None, shape=(2, 4)):
    data = None if data is None else torch.tensor(data)
    return Mask.create_mask_from_indices(shape, torch.tensor(indices), torch.tensor(ptr), data, torch.float32)


def test_flags_of_full_and_empty_are_found_in_values():
    shape = (2, 4)
    for full in (
        Mask.create_full_mask(shape, torch.float32, torch.device("cpu")),
        dense(torch.ones(shape)),
        row_wise([[3, 1, 0, 2], [0, 1, 2, 3]]),
        dense(torch.full(shape, 0.5)).merge_mask(dense(torch.full(shape, 0.5))),
    ):
        assert full.is_full_mask()
        assert not full.is_empty_mask()
        assert full.get_density() == 1.0
        assert torch.equal(full.get_dense_mask(), torch.ones(shape))
        assert full.get_index_mask()[0].tolist() == list(range(8))
    for empty in (
        Mask.create_empty_mask(shape, torch.float32, torch.device("cpu")),
        dense(torch.zeros(shape)),
        rows([], [0, 0, 0]),
        rows([1, 5], [0, 1, 2], [0.0, 0.0]),
        row_wise([[-1, -1], [-1, -1]], use_padding=True),
    ):
        assert empty.is_empty_mask()
        assert not empty.is_full_mask()
        assert empty.get_density() == 0.0
        assert not empty.get_dense_mask().any()
    assert not any((dense(VALUES).is_full_mask(), dense(VALUES).is_empty_mask()))
    assert not dense(torch.full(shape, 0.5)).is_full_mask()


def test_constructors_agree():
    mask = dense(VALUES)
    indices, ptr, data = mask.get_index_mask()
    assert indices.tolist() == [1, 2, 6, 7, 8, 9, 11]
    assert ptr.tolist() == [0, 2, 2, 5, 7]
    assert data.tolist() == [1, 0.5, 1, 1, 1, 0.25, 1]
    shuffled = Mask.create_mask_from_indices(SHAPE, indices[[1, 0, 4, 3, 2, 6, 5]], ptr, data[[1, 0, 2, 3, 4, 6, 5]])
    columns = torch.tensor([[2, 1, -1], [-1, -1, -1], [0, 2, 1], [2, -1, 0]]).reshape(*SHAPE[:-1], 3)
    chances = torch.tensor([[0.5, 1, 9], [9, 9, 9], [1, 1, 1], [1, 9, 0.25]]).reshape(columns.shape).clamp(max=1)
    for kind in ("index", "dense"):
        by_row = Mask.create_from_row_wise_idx(SHAPE, columns, chances, kind, torch.float32, use_padding=True)
        assert torch.equal(by_row.get_dense_mask(), VALUES)
    assert torch.equal(shuffled.get_dense_mask(), VALUES)
    assert all(map(torch.equal, shuffled.get_index_mask(), mask.get_index_mask()))


def test_bool_tensors_and_other_types_of_values():
    mask = Mask.create_mask_from_dense_mask((3,), torch.tensor([True, False, True]), torch.float64)
    assert mask.get_dense_mask().dtype == torch.float64
    merged = dense(torch.tensor([0.5, 0.0, 0.0]), torch.bfloat16).merge_mask(dense(torch.tensor([0.3, 0.1, 0.0])))
    assert merged.dtype == torch.float32
    assert_close(merged.get_dense_mask(), torch.tensor([0.8, 0.1, 0.0]))


def test_a_mask_is_a_value():
    source = VALUES.clone()
    mask = dense(source)
    source.zero_()
    mask.get_dense_mask().zero_()
    for part in mask.get_index_mask():
        part.zero_()
    assert torch.equal(mask.get_dense_mask(), VALUES)
    indices, ptr, data = mask.get_index_mask()
    compressed = Mask.create_mask_from_indices(SHAPE, indices, ptr, data)
    for part in (indices, ptr, data, *compressed.get_index_mask()):
        part.zero_()
    compressed.get_dense_mask().zero_()
    assert torch.equal(compressed.get_dense_mask(), VALUES)
    full = Mask.create_full_mask(SHAPE)
    full.get_dense_mask().zero_()
    assert full.get_dense_mask().all()


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_only_a_merge_in_place_changes_a_mask(mode):
    empty, mask = Mask.create_empty_mask(SHAPE), dense(VALUES)
    # The neutral side: the result must not be the other mask itself.
    merged = empty.merge_mask(mask, mode=mode)
    assert merged.merge_mask(Mask.create_full_mask(SHAPE), inplace=True, mode=mode) is merged
    assert merged.is_full_mask()
    assert torch.equal(mask.get_dense_mask(), VALUES)
    assert empty.is_empty_mask()
    kept = mask.merge_mask(empty)
    kept.merge_mask(mask, inplace=True, mode=mode)
    assert torch.equal(kept.get_dense_mask(), (2 * VALUES).clamp(max=1))
    assert torch.equal(mask.get_dense_mask(), VALUES)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_applying_a_mask(mode):
    x = torch.randn(SHAPE)
    mask = dense(VALUES)
    assert_close(mask.apply_mask(x, mode), x * VALUES)
    assert_close(mask.apply_inv_mask(x, mode), torch.where(VALUES > 0, x / VALUES, 0))
    tiny = dense(torch.full(SHAPE, 1e-6))
    assert_close(tiny.apply_inv_mask(x, mode), x / 1e-6)
    full, empty = Mask.create_full_mask(SHAPE), Mask.create_empty_mask(SHAPE)
    for apply in (Mask.apply_mask, Mask.apply_inv_mask):
        assert apply(full, x, mode) is x
        assert torch.equal(apply(empty, x, mode), torch.zeros(SHAPE))
    infinite = torch.where(VALUES > 0, x, torch.inf)
    assert mask.apply_mask(infinite, mode).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense(torch.tensor([0.5, 1.5])), "mask holds 1.5"),
        (lambda: dense(torch.tensor([0.5, -0.1])), "mask holds -0.1"),
        (lambda: dense(torch.tensor([0.5, torch.nan])), "mask holds nan"),
        (lambda: dense(torch.tensor([0.5, torch.inf])), "mask holds inf"),
        (lambda: Mask.create_mask_from_dense_mask((2, 3), torch.ones(3, 2)), r"valid: \[2, 3\]"),
        (lambda: Mask.create_full_mask((2,), torch.int64), "dtype=torch.int64"),
        (lambda: Mask.create_empty_mask(()), "shape="),
        (lambda: rows([1, 5], [0, 1, 2], [0.5, 2.0]), "data holds 2.0"),
        (lambda: rows([1, 5], [0, 1, 2], [0.5]), "data has shape"),
        (lambda: rows([1, 1], [0, 2, 2]), "indices holds 1 twice"),
        (lambda: rows([1, 2], [0, 1, 2]), "indices holds 2 in row 1; valid there: 4 to 7"),
        (lambda: rows([1, 8], [0, 1, 2]), "indices holds 8 in row 1"),
        (lambda: rows([-1, 5], [0, 1, 2]), "indices holds -1 in row 0"),
        (lambda: rows([1, 5], [0, 1, 3]), "ptr="),
        (lambda: rows([1, 5], [1, 1, 2]), "ptr="),
        (lambda: rows([1, 5], [0, 2]), "ptr="),
        (lambda: rows([1, 2, 5], [0, 4, 3]), "ptr="),
        (lambda: row_wise([[0, 0], [1, 2]]), "twice"),
        (lambda: row_wise([[0, 4], [1, 2]]), "column 4; valid: 0 to 3"),
        (lambda: row_wise([[0, -1], [1, 2]]), "column -1; valid: 0 to 3"),
        (lambda: row_wise([[0, -2], [1, 2]], use_padding=True), "column -2; valid: -1 to 3"),
        (lambda: row_wise([[0], [1], [2]]), "row_wise_idx has shape"),
        (lambda: row_wise([[0], [1]], torch.ones(2, 2)), "data has shape"),
        (lambda: row_wise([[0], [1]], mask_type="rows"), "mask_type='rows'"),
        (lambda: dense(VALUES).merge_mask(dense(VALUES[0])), "other has shape"),
        (lambda: dense(VALUES).merge_mask(dense(VALUES), mode="fast"), "mode='fast'"),
        (lambda: dense(VALUES).apply_mask(VALUES[0]), "x has shape"),
        (lambda: dense(VALUES).apply_inv_mask(VALUES, mode="rows"), "mode='rows'"),
    ],
)
def test_what_is_no_mask_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- attention under a mask -------------------------------------------------------------------------------------------


def test_large_logits_that_are_not_selected_do_not_make_others_underflow():
    q, v = torch.full((1, 1, 1, 4), 100.0), torch.randn(1, 1, 3, 2)
    k = torch.tensor([[0.0] * 4, [0.01] * 4, [9.0] * 4]).reshape(1, 1, 3, 4)
    mask = dense(torch.tensor([1.0, 1.0, 0.0]).reshape(1, 1, 1, 3))
    output, weights = masked_attention(q, k, v, mask, 1.0)
    expected = torch.tensor([0.0, 4.0]).softmax(-1)
    assert_close(weights.flatten()[:2], expected)
    assert_close(output.flatten(), expected @ v[0, 0, :2])


@pytest.mark.parametrize("how", ["empty", "zeros", "forbidden"])
def test_rows_without_keys_give_zeros_and_no_nan_in_gradients(how):
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    mask = Mask.create_empty_mask((1, 2, 3, 3)) if how == "empty" else dense(torch.zeros(1, 2, 3, 3))
    attention_mask = None
    if how == "forbidden":
        mask, attention_mask = Mask.create_full_mask((1, 2, 3, 3)), torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    output, weights = masked_attention(q, k, v, mask, 0.5, attention_mask)
    assert not output.any()
    assert not weights.any()
    output.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("probability", [1e-6, 1e-30, 0.3])
def test_the_weight_of_a_drawn_key_is_exactly_one_over_its_probability(probability):
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2, 2), torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    mask = dense(torch.tensor([probability, 1.0]).reshape(1, 1, 1, 2))
    output, _ = masked_attention(q, k, v, mask, 1.0)
    assert_close(output.item(), 1 / (1 + probability), rtol=1e-6, atol=0)


def test_dropout_acts_on_normalised_weights_in_training_only():
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 400, 4), torch.ones(1, 1, 400, 1)
    full = Mask.create_full_mask((1, 1, 1, 400))
    outputs = torch.stack([masked_attention(q, k, v, full, 1.0, None, 0.5, True)[0] for _ in range(400)])
    assert outputs.std() > 0.01
    assert abs(outputs.mean() - 1) < 4 * outputs.std() / 20
    output, weights = masked_attention(q, k, v, full, 1.0, None, 0.5, True)
    assert_close(weights.sum().item(), 1.0)
    assert_close(masked_attention(q, k, v, full, 1.0, None, 0.5, False)[0].item(), 1.0)


def test_half_types_are_computed_in_float32():
    q, k, v = (torch.randn(1, 2, 9, 16) for _ in range(3))
    halves = [x.to(torch.bfloat16) for x in (q, k, v)]
    mask = dense(torch.rand(1, 2, 9, 9).clamp(min=0.1))
    expected, weights = masked_attention(*(x.float() for x in halves), mask, 0.25)
    output, half_weights = masked_attention(*halves, mask, 0.25)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.to(torch.bfloat16))
    assert torch.equal(half_weights, weights)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 2, 4), (1, 2, 5, 4), (1, 2, 5, 4)], "3 query heads and 2 key heads"),
        ([(2, 2, 2, 4), (1, 2, 5, 4), (1, 2, 5, 4)], "batch or width differ"),
        ([(1, 2, 2, 4), (1, 2, 5, 3), (1, 2, 5, 4)], "batch or width differ"),
        ([(1, 2, 2, 4), (1, 2, 5, 4), (1, 2, 6, 4)], "values have shape"),
        ([(2, 2, 4), (1, 2, 5, 4), (1, 2, 5, 4)], "queries have shape"),
        ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4)], "mask has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        masked_attention(*(torch.zeros(shape) for shape in shapes), Mask.create_full_mask((1, 2, 2, 5)), 1.0)


@pytest.mark.parametrize("attention_mask", [torch.ones(2, 5, dtype=torch.long), torch.ones(3, 5), torch.ones(2, 4)])
def test_attention_masks_that_do_not_fit_are_refused(attention_mask):
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match="attention_mask"):
        masked_attention(q, k, k, Mask.create_full_mask((1, 1, 2, 5)), 1.0, attention_mask)
