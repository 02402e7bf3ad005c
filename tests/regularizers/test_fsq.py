"""FSQ: every token survives a round trip, gradients pass straight through, training noise acts per sample."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.regularizers.quantize_fsq import FSQ

LEVEL_SETS = ([2, 2], [3, 7], [8, 5, 5, 5], [8, 8, 8, 5, 5, 5], [26, 5], [27, 39], [42, 3])
every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=lambda levels: "-".join(map(str, levels)))
small_levels = st.lists(st.integers(2, 48), min_size=1, max_size=3)


def make_fsq(levels, **kwargs):
    keys = {"latents_read_key": "z", "quants_write_key": "q", "tokens_write_key": "ids"}
    return FSQ(**keys, levels=levels, **kwargs)


def code_values(num_levels):
    """What one channel can be: -1 .. 1 for odd counts; even counts stop one step short of 1."""
    half = num_levels // 2
    return [(digit - half) / half for digit in range(num_levels)]


@every_level_set
def test_every_token_survives_a_round_trip(levels):
    fsq = make_fsq(levels)
    tokens = torch.arange(math.prod(levels))
    assert fsq.codebook_size == len(tokens)
    codes = fsq.indices_to_embedding(tokens)
    assert codes.shape == (len(tokens), len(levels))
    assert codes.dtype == torch.float32
    lost = (fsq.codes_to_indices(codes) != tokens).nonzero().flatten()
    assert len(lost) == 0, f"{len(lost)} tokens change, the first is {lost[:1].tolist()}"


@every_level_set
def test_the_codebook_is_the_product_of_the_channels_first_channel_fastest(levels):
    codes = make_fsq(levels).indices_to_embedding(torch.arange(math.prod(levels)))
    stride = 1
    for channel, count in enumerate(levels):
        digits = torch.arange(len(codes)) // stride % count
        torch.testing.assert_close(codes[:, channel], torch.tensor(code_values(count))[digits])
        stride *= count


@every_level_set
def test_every_code_is_a_fixed_point_of_the_codebook(levels):
    """Quantising can reach each level of each channel, the outermost ones included."""
    fsq = make_fsq(levels).eval()
    for channel, count in enumerate(levels):
        z = torch.zeros(1, 4001, len(levels))
        z[0, :, channel] = torch.linspace(-12, 12, 4001)
        reached = fsq({"z": [z]})["q"][0][0, :, channel].unique()
        torch.testing.assert_close(reached, torch.tensor(code_values(count)))


def test_even_level_counts_are_asymmetric():
    extremes = torch.tensor([[[-50.0, -50.0, -50.0], [50.0, 50.0, 50.0]]])
    quants = make_fsq([2, 8, 5]).eval()({"z": [extremes]})["q"][0]
    assert quants[0].tolist() == [[-1.0, -1.0, -1.0], [0.0, 0.75, 1.0]]


@pytest.mark.parametrize("packed_call", [True, False])
def test_gradient_passes_straight_through_the_rounding(packed_call):
    fsq = make_fsq([8, 5, 3], packed_call=packed_call)
    z = torch.randn(1, 20, 3, requires_grad=True)
    weights = torch.randn(1, 20, 3)
    (gradient,) = torch.autograd.grad((fsq({"z": [z]})["q"][0] * weights).sum(), z)
    half_width = torch.tensor([4.0, 2.0, 1.0])
    (expected,) = torch.autograd.grad((fsq.bound(z) / half_width * weights).sum(), z)
    torch.testing.assert_close(gradient, expected)
    assert (gradient != 0).all()


@pytest.mark.parametrize("packed_call", [True, False])
def test_lists_tensors_and_images_give_the_same_tokens(packed_call):
    fsq = make_fsq([8, 5, 3], packed_call=packed_call).eval()
    entries = [torch.randn(1, n, 3) for n in (4, 6, 1)]
    together = fsq({"z": entries})
    assert [ids.shape for ids in together["ids"]] == [(1, 4), (1, 6), (1, 1)]
    for i, entry in enumerate(entries):
        alone = fsq({"z": entry})
        assert torch.equal(torch.as_tensor(alone["ids"][0]).view(-1), together["ids"][i].view(-1))
        assert together["ids"][i].dtype == torch.int64
    # Two images [1, d, H, W] of different size, in packed mode.
    if packed_call:
        images = [torch.randn(1, 3, 2, 2), torch.randn(1, 3, 4, 1)]
        out = fsq({"z": images})
        for image, quants, ids in zip(images, out["q"], out["ids"], strict=True):
            tokens = fsq({"z": [image.flatten(2).transpose(1, 2)]})
            assert torch.equal(ids.flatten(1), tokens["ids"][0])
            assert torch.equal(quants.flatten(2).transpose(1, 2), tokens["q"][0])
            assert quants.shape == image.shape
            assert ids.shape == (1, *image.shape[2:])


def test_no_state_and_levels_can_be_read():
    fsq = make_fsq([8, 8, 5])
    assert fsq.state_dict() == {}
    assert fsq._levels.tolist() == [8, 8, 5]
    assert fsq.dim == 3


def test_half_precision_inputs_are_quantised_in_full_precision():
    z = torch.randn(1, 30, 3)
    fsq = make_fsq([8, 5, 3]).eval()
    expected = fsq({"z": [z.bfloat16().float()]})["ids"][0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fsq({"z": [z.bfloat16()]})["ids"][0], expected)


# Training noise

NUM_SAMPLES = 64


def sample_list(num_levels, num_tokens=8):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, num_tokens, num_levels, generator=generator) for _ in range(NUM_SAMPLES)]


@pytest.mark.parametrize("packed_call", [True, False])
def test_quantiser_dropout_hits_whole_samples_one_by_one(packed_call):
    fsq = make_fsq([8, 5, 3], drop_quant_p=0.5, packed_call=packed_call).train()
    entries = sample_list(3)
    quants = fsq({"z": entries, "rng": torch.Generator().manual_seed(0)})["q"]
    rounded = fsq.eval()({"z": entries})["q"]
    half_width = torch.tensor([4.0, 2.0, 1.0])
    num_dropped = 0
    for z, q, r in zip(entries, quants, rounded, strict=True):
        dropped = not torch.allclose(q, r)
        num_dropped += dropped
        torch.testing.assert_close(q, fsq.bound(z) / half_width if dropped else r)
    assert 16 <= num_dropped <= 48


@pytest.mark.parametrize("kwargs", [{"drop_quant_p": 0.5}, {"corrupt_tokens_p": 0.5, "apply_corrupt_tokens_p": 1.0}])
@pytest.mark.parametrize("packed_call", [True, False])
def test_training_noise_comes_from_the_generator_in_the_dictionary(kwargs, packed_call):
    fsq = make_fsq([8, 5, 3], packed_call=packed_call, **kwargs).train()
    entries = sample_list(3)

    def run(seed):
        torch.manual_seed(seed + 100)
        before = torch.random.get_rng_state()
        quants = fsq({"z": entries, "rng": torch.Generator().manual_seed(seed)})["q"]
        assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
        return torch.cat(list(quants))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("packed_call", [True, False])
def test_training_noise_without_a_generator_follows_the_global_seed(packed_call):
    fsq = make_fsq([8, 5, 3], drop_quant_p=0.5, packed_call=packed_call).train()

    def run(seed):
        torch.manual_seed(seed)
        return torch.cat(list(fsq({"z": sample_list(3)})["q"]))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("packed_call", [True, False])
def test_corruption_replaces_the_asked_share_by_codebook_entries(packed_call):
    share = {"corrupt_tokens_p": 0.5, "min_corrupt_tokens_p": 0.5, "apply_corrupt_tokens_p": 1.0}
    fsq = make_fsq([8, 8, 5, 5], packed_call=packed_call, **share).train()
    entries = sample_list(4, num_tokens=64)
    out = fsq({"z": entries, "rng": torch.Generator().manual_seed(0)})
    clean = torch.cat(list(fsq.eval()({"z": entries})["ids"]))
    ids = torch.cat(list(out["ids"]))
    changed = (ids != clean).float().mean()
    assert 0.45 < changed < 0.55
    assert torch.equal(fsq.codes_to_indices(torch.cat(list(out["q"]))).long(), ids)
    replacements = ids[ids != clean]
    assert replacements.min() >= 0
    assert replacements.max() < fsq.codebook_size
    assert len(replacements.unique()) > 500


@pytest.mark.parametrize("lengths", [[64] * 4, [64, 40, 64, 30]], ids=["equal", "mixed"])
def test_corruption_is_decided_once_per_call_and_drawn_for_each_sample(lengths):
    share = {"corrupt_tokens_p": 0.5, "min_corrupt_tokens_p": 0.5, "apply_corrupt_tokens_p": 0.5}
    fsq = make_fsq([8, 8, 5, 5], **share)
    entries = [torch.randn(1, n, 4) for n in lengths]
    clean = fsq.eval()({"z": entries})["ids"]
    decisions = []
    for seed in range(40):
        ids = fsq.train()({"z": entries, "rng": torch.Generator().manual_seed(seed)})["ids"]
        changed = [(a != b)[0, :30] for a, b in zip(ids, clean, strict=True)]
        touched = {bool(c.any()) for c in changed}
        assert len(touched) == 1, "one call corrupts some samples and spares others"
        decisions += touched
        assert not touched.pop() or not torch.equal(changed[0], changed[1])
    assert 10 <= sum(decisions) <= 30


@pytest.mark.parametrize("kwargs", [{"corrupt_tokens_p": 0.9, "apply_corrupt_tokens_p": 0.0}, {}])
def test_no_corruption_when_it_is_not_applied(kwargs):
    entries = sample_list(3)
    fsq = make_fsq([8, 5, 3], **kwargs)
    trained, evaluated = fsq.train()({"z": entries}), fsq.eval()({"z": entries})
    assert all(torch.equal(a, b) for a, b in zip(trained["ids"], evaluated["ids"], strict=True))


def test_evaluation_is_never_noisy():
    entries = sample_list(3)
    noisy = make_fsq([8, 5, 3], drop_quant_p=1.0, corrupt_tokens_p=1.0, apply_corrupt_tokens_p=1.0).eval()
    plain = make_fsq([8, 5, 3]).eval()
    for a, b in zip(noisy({"z": entries})["q"], plain({"z": entries})["q"], strict=True):
        assert torch.equal(a, b)


# Properties over all level sets


@given(small_levels, st.floats(0.0, 30.0), st.integers(0, 2**16))
def test_quantised_values_are_codes_and_their_tokens_name_them(levels, spread, seed):
    fsq = make_fsq(levels).eval()
    z = torch.randn(1, 50, len(levels), generator=torch.Generator().manual_seed(seed)) * spread
    out = fsq({"z": [z]})
    quants, ids = out["q"][0], out["ids"][0]
    assert ids.min() >= 0
    assert ids.max() < math.prod(levels)
    torch.testing.assert_close(fsq.indices_to_embedding(ids), quants, atol=1e-6, rtol=0)
    for channel, count in enumerate(levels):
        distance = (quants[0, :, channel, None] - torch.tensor(code_values(count))).abs().min(-1).values
        assert distance.max() < 1e-6


@given(small_levels, st.integers(0, 2**16))
def test_quantisation_keeps_order_and_stays_within_half_a_level(levels, seed):
    fsq = make_fsq(levels).eval()
    z = torch.randn(1, 50, len(levels), generator=torch.Generator().manual_seed(seed)) * 3
    quants = fsq({"z": [z]})["q"][0]
    half_width = torch.tensor([count // 2 for count in levels])
    assert ((quants * half_width - fsq.bound(z)).abs() <= 0.5 + 1e-4).all()
    for channel in range(len(levels)):
        ordered = quants[0, z[0, :, channel].argsort(), channel]
        assert (ordered.diff() >= 0).all()


@given(small_levels, st.integers(0, 2**16))
def test_any_token_survives_a_round_trip(levels, seed):
    fsq = make_fsq(levels)
    tokens = torch.randint(math.prod(levels), (64,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fsq.codes_to_indices(fsq.indices_to_embedding(tokens)).long(), tokens)
