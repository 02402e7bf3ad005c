"""Where wordings lie in a packed prompt, and which positions their tokens have."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flextok.fusion import MissingTailWarning, concatenate_paraphrases_with_positions, pack_prompts, pack_segments
from tests.fusion.recorded import cases_of, packed, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore::flextok.fusion.packing.MissingTailWarning")

ids = st.lists(st.integers(3, 90), min_size=1, max_size=6)
maybe_ids = st.lists(st.integers(3, 90), max_size=4)


class Letters:
    """A tokenizer of single characters, with BOS 1 before a text with special tokens; `sep` is one token."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


@pytest.mark.parametrize("case", cases_of("fused"), ids=lambda case: case["name"])
def test_recorded_layouts(case):
    prompt, recorded = packed(case), tensors_of("fused")
    for name in ("input_ids", "segment_ids", "position_ids"):
        assert torch.equal(getattr(prompt, name), recorded[f"{case['name']}.{name}"])
    assert [list(span) for span in prompt.spans] == case["spans"]
    assert (prompt.fusion_start, prompt.next_position) == (case["fusion_start"], case["next_position"])


@given(segments=st.lists(ids, min_size=1, max_size=4), prefix=maybe_ids, separator=maybe_ids, tail=maybe_ids)
def test_every_token_is_where_the_spans_say(segments, prefix, separator, tail):
    prompt = pack_segments(segments, prefix=prefix, separator=separator, tail=tail)
    texts = [prompt.input_ids[start:end].tolist() for start, end in prompt.spans]
    assert texts == [prefix] * bool(prefix) + segments
    assert [prompt.input_ids[start:end].tolist() for start, end in prompt.wording_spans] == segments
    assert prompt.input_ids[prompt.fusion_start :].tolist() == tail
    num_separators = len(separator) * (len(segments) - 1)
    assert len(prompt) == len(prefix) + sum(map(len, segments)) + num_separators + len(tail)
    for number, (start, end) in enumerate(prompt.spans):
        assert (prompt.segment_ids[start:end] == number).all()
    assert int((prompt.segment_ids < 0).sum()) == num_separators + len(tail)


@given(segments=st.lists(ids, min_size=1, max_size=4), separator=maybe_ids, tail=maybe_ids)
def test_the_three_ways_to_count_positions(segments, separator, tail):
    restart, running, aligned = (
        pack_segments(segments, separator=separator, tail=tail, positions=mode)
        for mode in ("restart", "running", "aligned")
    )
    longest = max(map(len, segments))
    assert running.position_ids.tolist() == list(range(len(running)))
    assert running.next_position == len(running)
    for prompt in (restart, aligned):
        after = range(longest, longest + len(tail))
        assert prompt.position_ids[prompt.fusion_start :].tolist() == list(after)
        assert prompt.next_position == longest + len(tail)
    for start, end in restart.spans:
        assert restart.position_ids[start:end].tolist() == list(range(end - start))
        assert aligned.position_ids[start:end].tolist() == list(range(longest - (end - start), longest))


def test_a_prefix_is_read_by_all_and_counted_once():
    prompt = pack_segments([[5, 6], [7, 8, 9]], prefix=[3, 4], separator=[10], tail=[11])
    assert prompt.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert prompt.adjacency.tolist() == [[True, False, False], [True, True, False], [True, False, True]]
    assert prompt.wording_spans == ((2, 4), (5, 8))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_each_wording_is_tokenised_by_itself():
    prompt = pack_prompts(["ab", "c"], Letters(), separator="|", tail="=")
    assert prompt.input_ids.tolist() == [1, 97, 98, 124, 1, 99, 61]
    assert prompt.spans == ((0, 3), (4, 6))


def test_with_a_prefix_only_the_prefix_begins_with_special_tokens():
    prompt = pack_prompts(["ab", "c"], Letters(), prefix="p", tail="=")
    assert prompt.input_ids.tolist() == [1, 112, 97, 98, 99, 61]
    assert prompt.spans == ((0, 2), (2, 4), (4, 5))


def test_reported_spans_leave_special_tokens_out():
    text, spans, length = concatenate_paraphrases_with_positions(["abc", "de"], Letters())
    assert text == "abc\n\n[SEP]\n\nde"
    assert spans == [(0, 3), (12, 14)]
    assert length == 14
    assert concatenate_paraphrases_with_positions(["abc", "de"], Letters(), separator="")[1] == [(0, 3), (3, 5)]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [[], [9]], ids=["without", "with"])
def test_a_missing_tail_is_warned_of_where_it_matters(tail):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pack_segments([[3], [4]], tail=tail)
        pack_prompts(["a", "b"], Letters(), tail="".join(map(str, tail)))
        pack_segments([[3]], tail=tail)
    expected = [] if tail else [MissingTailWarning] * 2
    assert [warning.category for warning in caught] == expected
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segments": []}, "segments is empty"),
        ({"segments": [[3], []]}, r"segments\[1\] has no tokens"),
        (
            {"segments": [[3]], "positions": "absolute"},
            "positions='absolute' is unknown; valid: restart, running, aligned",
        ),
        ({"segments": [[3]], "positions": "aligned", "prefix": [4]}, "'aligned' with a prefix"),
    ],
)
def test_prompts_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_segments(**arguments)


def test_texts_that_make_no_sense():
    class Silent:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": []}

    with pytest.raises(ValueError, match="prompts is empty"):
        pack_prompts([], Letters())
    with pytest.raises(ValueError, match="prompts is empty"):
        concatenate_paraphrases_with_positions([], Letters())
    with pytest.raises(ValueError, match=r"prompts\[0\]='a' has no tokens"):
        pack_prompts(["a"], Silent())
