"""Masks, outputs and weights equal the recorded ones."""

import pytest
import torch
from torch.testing import assert_close

from flextok.attention.sparse import Mask, masked_attention
from tests.attention.sparse.vectors import attention_of, call, dense, mask_of, recorded


@pytest.mark.parametrize("name", recorded("fixed"))
def test_fixed_maskers(name):
    case, tensors = recorded("fixed")[name]
    mask, output, weights = call(tensors, case, attention_of(case["specs"]))
    attends = torch.ones_like(tensors["mask"])
    if "attention_mask" in tensors:
        attends = (tensors["attention_mask"] > -1e30).float().expand_as(attends)
    assert torch.equal(dense(mask) * attends, tensors["mask"] * attends)
    assert mask.is_full_mask() == case["full"]
    assert_close(output, tensors["out"], rtol=0, atol=2e-5)
    if "weights" in tensors:
        assert_close(weights, tensors["weights"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", recorded("ops", "mask_ops"))
def test_operations_of_masks(name):
    case, tensors = recorded("ops")[name]
    a, b = mask_of(tensors["a"]), mask_of(tensors["b"])
    rows = Mask.create_mask_from_indices(a.shape, *(tensors[key] for key in ("indices", "ptr", "data")), torch.float32)
    assert_close(dense(rows), tensors["a"], rtol=0, atol=1e-6)
    for found, key in zip(a.get_index_mask(), ("indices", "ptr", "data"), strict=True):
        assert_close(found, tensors[key], rtol=0, atol=1e-6)
    for mask in (a, rows):
        assert mask.get_density() == pytest.approx(case["density"], abs=1e-6)
        for mode in ("dense", "sparse"):
            assert_close(dense(mask.merge_mask(b, mode=mode)), tensors["merged"], rtol=0, atol=1e-6)
            assert_close(mask.apply_mask(tensors["x"], mode), tensors["applied"], rtol=0, atol=2e-5)
            assert_close(mask.apply_inv_mask(tensors["x"], mode), tensors["inv"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", recorded("ops", "core"))
def test_attention_under_fractional_masks(name):
    case, tensors = recorded("ops")[name]
    q, k, v = (tensors[key] for key in "qkv")
    output, weights = masked_attention(
        q, k, v, mask_of(tensors["mask"]), case["scaling"], tensors.get("attention_mask")
    )
    assert_close(output, tensors["out"], rtol=0, atol=2e-5)
    assert_close(weights, tensors["weights"], rtol=0, atol=2e-5)


def with_weights(tensors, specs):
    """`specs` with the recorded weights of HashAttention."""
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("hat."):
            _, layer, part, _ = name.split(".")
            weights.setdefault(int(layer), {}).setdefault(part, []).append(tensor)
    return [spec | ({"hat_weights": weights} if spec["type"].startswith("Hash") else {}) for spec in specs]


@pytest.mark.parametrize("name", recorded("hash"))
def test_hash_attention(name):
    case, tensors = recorded("hash")[name]
    specs = with_weights(tensors, case["specs"])
    mask, output, _ = call(tensors, case, attention_of(specs))
    new = dense(mask) - tensors["prev"]
    if case["kind"] == "hash_ties":
        rows = [x.flatten(0, -2) for x in (tensors["scores"], new, tensors["mask"] - tensors["prev"])]
        for scores, chosen, expected in zip(*rows, strict=True):
            assert torch.equal(scores[chosen > 0].sort().values, scores[expected > 0].sort().values)
            lowest = scores[chosen > 0].min()
            assert not (chosen[scores == lowest].diff() > 0).any(), "of equal scores the first keys are taken"
        return
    assert torch.equal(dense(mask), tensors["mask"])
    assert_close(output, tensors["out"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", recorded("hash"))
def test_hash_attention_of_keys_that_grow(name):
    case, tensors = recorded("hash")[name]
    specs = with_weights(tensors, case["specs"])
    growing = [spec | ({"cache_keys": True} if "hat_weights" in spec else {}) for spec in specs]
    attention, state = attention_of(growing), {}
    num_first = case["grow"] or 7
    first = tensors | {name: tensors[name][:, :, :num_first] for name in "kv"}
    call(first, case, attention, sparse_meta_data=state)
    mask, _, _ = call(tensors, case, attention, sparse_meta_data=state)
    expected, _, _ = call(tensors, case, attention_of(specs))
    assert torch.equal(dense(mask), dense(expected))


@pytest.mark.parametrize("packing", ["int64", "float32"])
@pytest.mark.parametrize("name", recorded("magicpig"))
def test_magic_pig(name, packing):
    case, tensors = recorded("magicpig")[name]
    specs = [spec | ({"packing": packing} if spec["type"] == "MagicPig" else {}) for spec in case["specs"]]
    for chosen, expected in ((specs[-1:], "this"), (specs, "mask")):
        state = {"projections": {case["layer_idx"]: tensors["projections"]}}
        mask, output, _ = call(tensors, case, attention_of(chosen), sparse_meta_data=state)
        assert_close(dense(mask), tensors[expected], rtol=0, atol=5e-6)
    assert_close(output, tensors["out"], rtol=0, atol=1e-4)
