"""Fused generation gives the recorded tokens and logits, in a batch as one by one, with a cache as without."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flextok.fusion import Beams, Greedy, Sampling, generate_fused, pack_segments
from tests.fusion.recorded import cases_of, packed, random_ids, recorded_model, tensors_of
from tests.support import max_difference

pytestmark = pytest.mark.filterwarnings("ignore::flextok.fusion.packing.MissingTailWarning")


@pytest.fixture(scope="module")
def model():
    return recorded_model()


def some_prompts():
    """Of all layouts and lengths, with and without prefix, separators and tail."""
    return [packed(case) for case in cases_of("fused")]


# --- recorded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
@pytest.mark.parametrize("case", cases_of("fused"), ids=lambda case: case["name"])
def test_recorded_logits_and_tokens(model, case, backend):
    recorded = {
        name: tensors_of("fused").get(f"{case['name']}.{name}")
        for name in ("prefill_logits", "step_logits", "tokens", "eos_tokens", "hidden_first_logits")
    }
    prompt, length = packed(case), case["max_new_tokens"]
    out = generate_fused(model, [prompt], max_new_tokens=length, return_logits=True, backend=backend)
    assert torch.equal(out.sequences[0], recorded["tokens"])
    assert out.lengths.tolist() == [length]
    assert max_difference(out.prefill_logits[0], recorded["prefill_logits"]) < 1e-4
    assert max_difference(out.step_logits[0], recorded["step_logits"]) < 1e-4
    stopped = generate_fused(model, [prompt], max_new_tokens=length, eos_token_ids=[case["eos"]], backend=backend)
    assert torch.equal(stopped.sequences[0], recorded["eos_tokens"])
    assert stopped.lengths.tolist() == [len(recorded["eos_tokens"])]
    if recorded["hidden_first_logits"] is not None:
        hidden = generate_fused(
            model, [prompt], max_new_tokens=1, gap_keys="hidden", return_logits=True, backend=backend
        )
        assert max_difference(hidden.step_logits[0, 0], recorded["hidden_first_logits"]) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_of_the_model_makes_no_difference_and_is_restored(attention):
    model, case = recorded_model(attention), cases_of("fused")[0]
    out = generate_fused(model, [packed(case)], max_new_tokens=case["max_new_tokens"])
    assert torch.equal(out.sequences[0], tensors_of("fused")[f"{case['name']}.tokens"])
    assert model.config._attn_implementation == attention


# --- batches and caches -----------------------------------------------------------------------------------------------

ways = pytest.mark.parametrize(
    "options",
    [{}, {"gap_keys": "hidden"}, {"backend": "flex"}, {"backend": "eager", "gap_keys": "hidden"}],
    ids=["plain", "hidden", "flex", "eager hidden"],
)


@ways
def test_a_batch_is_its_prompts_one_by_one(model, options):
    prompts = some_prompts()[::2]
    together = generate_fused(model, prompts, max_new_tokens=6, return_logits=True, **options)
    for row, prompt in enumerate(prompts):
        alone = generate_fused(model, [prompt], max_new_tokens=6, return_logits=True, **options)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert max_difference(together.step_logits[row], alone.step_logits[0]) < 1e-4
        assert max_difference(together.prefill_logits[row], alone.prefill_logits[0]) < 1e-4


@ways
def test_reading_everything_again_for_every_token_changes_nothing(model, options):
    prompts = some_prompts()[1::3]
    weights = [[1.0 + 0.5 * k for k in range(len(prompt.wording_spans))] for prompt in prompts]
    options = {"max_new_tokens": 5, "return_logits": True, "weights": weights, **options}
    cached, again = (generate_fused(model, prompts, use_cache=choice, **options) for choice in (True, False))
    assert torch.equal(cached.sequences, again.sequences)
    assert max_difference(cached.step_logits, again.step_logits) < 1e-4


@settings(max_examples=15)
@given(data=st.data())
def test_any_prompts_in_any_batch(data):
    model = recorded_model()
    numbers = st.integers(1, 7)
    prompts = []
    for seed in range(data.draw(st.integers(1, 4))):
        lengths = data.draw(st.lists(numbers, min_size=1, max_size=4))
        prefix, separator, tail, *segments = random_ids(
            data.draw(st.integers(0, 4)),
            data.draw(st.integers(0, 2)),
            data.draw(st.integers(0, 2)),
            *lengths,
            seed=seed,
        )
        prompts.append(pack_segments(segments, prefix=prefix, separator=separator, tail=tail))
    gap_keys = data.draw(st.sampled_from(["visible", "hidden"]))
    together = generate_fused(model, prompts, max_new_tokens=3, gap_keys=gap_keys, return_logits=True)
    for row, prompt in enumerate(prompts):
        alone = generate_fused(
            model, [prompt], max_new_tokens=3, gap_keys=gap_keys, return_logits=True, use_cache=False
        )
        assert max_difference(together.step_logits[row], alone.step_logits[0]) < 1e-4
        assert torch.equal(together.sequences[row], alone.sequences[0])


def test_rows_stop_one_by_one(model):
    prompts = some_prompts()[:6]
    free = generate_fused(model, prompts, max_new_tokens=8)
    stops = {int(free.sequences[0, 1]), int(free.sequences[3, 4])}
    out = generate_fused(model, prompts, max_new_tokens=8, eos_token_ids=stops, pad_token_id=99)
    for row, tokens in enumerate(free.sequences.tolist()):
        length = next((i + 1 for i, token in enumerate(tokens) if token in stops), 8)
        assert out.lengths[row] == length
        assert out.token_lists()[row] == tokens[:length]
        assert (out.sequences[row, length:] == 99).all()


def test_generation_ends_when_all_rows_have(model):
    prompt = some_prompts()[0]
    first = int(generate_fused(model, [prompt], max_new_tokens=1).sequences)
    out = generate_fused(model, [prompt, prompt], max_new_tokens=50, eos_token_ids=[first])
    assert out.sequences.tolist() == [[first], [first]]


# --- what fusion means ------------------------------------------------------------------------------------------------


def test_each_wording_is_read_as_if_it_were_alone(model):
    prefix, *segments = random_ids(5, 7, 3, 6)
    packed_together = pack_segments(segments, prefix=prefix, tail=[9])
    logits = generate_fused(model, [packed_together], max_new_tokens=1, return_logits=True).prefill_logits[0]
    for (start, end), segment in zip(packed_together.wording_spans, segments, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([prefix + segment])).logits[0, len(prefix) :]
        assert max_difference(logits[start:end], alone) < 1e-4


def test_changing_a_wording_changes_no_other_one(model):
    segments = random_ids(6, 5, 7)
    changed = [segments[0], [*segments[1][:-1], 100], segments[2]]
    before, after = (
        generate_fused(model, [pack_segments(s, tail=[9])], max_new_tokens=1, return_logits=True).prefill_logits[0]
        for s in (segments, changed)
    )
    assert torch.equal(before[:10], after[:10])
    assert torch.equal(before[11:18], after[11:18])
    assert max_difference(before[10], after[10]) > 1e-2
    assert max_difference(before[18], after[18]) > 1e-2


@pytest.mark.parametrize("positions", ["restart", "aligned"])
def test_the_order_of_wordings_makes_no_difference(model, positions):
    segments = random_ids(6, 5, 7, 4)
    runs = [
        generate_fused(
            model, [pack_segments(order, tail=[9, 8], positions=positions)], max_new_tokens=6, return_logits=True
        )
        for order in (segments, segments[::-1])
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert max_difference(runs[0].step_logits, runs[1].step_logits) < 1e-4


def test_without_a_tail_the_first_token_sees_the_last_wording_alone(model):
    *others, last = random_ids(6, 5, 7)
    out = generate_fused(model, [pack_segments([*others, last])], max_new_tokens=2, return_logits=True)
    with torch.no_grad():
        alone = model(torch.tensor([last])).logits[0, -1]
    assert max_difference(out.step_logits[0, 0], alone) < 1e-4


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "flex", "eager"])
@pytest.mark.parametrize("prefix", [[], [44, 45, 46]], ids=["alone", "with prefix"])
def test_a_weight_is_a_number_of_repetitions(model, prefix, backend):
    first, second, third = random_ids(6, 5, 7)
    weighted = pack_segments([first, second, third], prefix=prefix, tail=[9, 8])
    repeated = pack_segments([first, second, second, second, third], prefix=prefix, tail=[9, 8])
    options = {"max_new_tokens": 5, "return_logits": True, "backend": backend}
    by_weight = generate_fused(model, [weighted], weights=[[1, 3, 1]], **options)
    by_copies = generate_fused(model, [repeated], **options)
    assert max_difference(by_weight.step_logits, by_copies.step_logits) < 1e-4
    assert torch.equal(by_weight.sequences, by_copies.sequences)


def test_a_wording_of_weight_zero_is_as_if_absent(model):
    first, second, third = random_ids(6, 7, 5)
    options = {"max_new_tokens": 5, "return_logits": True}
    weighted = generate_fused(model, [pack_segments([first, second, third], tail=[9])], weights=[[1, 1, 0]], **options)
    without = generate_fused(model, [pack_segments([first, second], tail=[9])], **options)
    assert max_difference(weighted.step_logits, without.step_logits) < 1e-4


def test_equal_weights_of_zero_count_equally(model):
    prompt, options = pack_segments(random_ids(6, 5), tail=[9]), {"max_new_tokens": 2, "return_logits": True}
    expected = generate_fused(model, [prompt], **options)
    assert torch.equal(generate_fused(model, [prompt], weights=[[0, 0]], **options).step_logits, expected.step_logits)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0]], r"weights\[0\]=\[1.0\]; valid: one number for each of the 2 wordings"),
        ([[1.0, -1.0]], "valid: finite numbers >= 0"),
        ([[1.0, float("nan")]], "valid: finite numbers >= 0"),
        ([], "weights are for 0 prompts; valid: one list for each of 1"),
    ],
)
def test_weights_that_make_no_sense(model, weights, message):
    with pytest.raises(ValueError, match=message):
        generate_fused(model, [pack_segments(random_ids(6, 5), tail=[9])], max_new_tokens=1, weights=weights)


# --- strategies and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [Sampling(seed=3), Sampling(top_k=4, temperature=0.7), Sampling(top_p=0.6, samples=3), Beams(3), Beams(2, 0.5)],
    ids=str,
)
def test_other_strategies_are_the_same_in_a_batch_and_without_a_cache(model, strategy):
    prompts = some_prompts()[2:7]
    options = {"max_new_tokens": 5, "eos_token_ids": [17, 60, 84], "strategy": strategy}
    together = generate_fused(model, prompts, **options).token_lists()
    alone = [tokens for p in prompts for tokens in generate_fused(model, [p], use_cache=False, **options).token_lists()]
    assert together == alone


def test_a_streamer_receives_every_token(model):
    class Streamer:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    out = generate_fused(model, some_prompts()[:3], max_new_tokens=4, strategy=Greedy(), streamer=streamer)
    assert torch.equal(torch.stack(streamer.values, dim=1), out.sequences)
    assert streamer.ended
    with pytest.raises(ValueError, match="nothing to stream"):
        generate_fused(model, some_prompts()[:1], max_new_tokens=4, strategy=Beams(2), streamer=streamer)
    with pytest.raises(ValueError, match="no scores of single steps"):
        generate_fused(model, some_prompts()[:1], max_new_tokens=4, strategy=Beams(2), return_logits=True)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0; valid: 1 or more"),
        ({"max_new_tokens": 504}, r"reach position 513; valid: up to 512"),
        ({"prompts": []}, "prompts is empty"),
        ({"gap_keys": "some"}, "gap_keys='some' is unknown; valid: visible, hidden"),
        ({"backend": "flash"}, "backend='flash' is unknown; valid: auto, sdpa, flex, eager"),
    ],
)
def test_bad_input(model, changes, message):
    arguments = {"prompts": [pack_segments(random_ids(6, 8), tail=[9])], "max_new_tokens": 2, **changes}
    with pytest.raises(ValueError, match=message):
        generate_fused(model, **arguments)
    assert model.config._attn_implementation == "sdpa"


def test_the_longest_text_that_fits(model):
    out = generate_fused(model, [pack_segments(random_ids(6, 500), tail=[9])], max_new_tokens=11)
    assert out.sequences.shape == (1, 11)
