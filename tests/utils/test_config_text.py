"""Config values survive being written as text, and text from elsewhere can't exhaust memory, stack or patience."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flextok.utils.config_text import MAX_CHARS, MAX_DEPTH, MAX_YAML_CHARS, format_value, parse_value

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_every_plain_value_survives_text(value):
    back = parse_value(format_value(value))
    assert back == value
    assert repr(back) == repr(value)


@pytest.mark.parametrize(
    "value",
    [1e-05, -0.0, 10**40, True, None, (), (1,), (2, 2), {}, [], {"a": (1, 2.0, None)}, ["None of these", "True"]],
    ids=repr,
)
def test_values_are_written_as_python_prints_them(value):
    assert format_value(value) == str(value)
    assert repr(parse_value(str(value))) == repr(value)


def test_dotted_paths_stay_bare():
    assert format_value("flextok.flextok_wrapper.FlexTok") == "flextok.flextok_wrapper.FlexTok"
    assert parse_value("flextok.flextok_wrapper.FlexTok") == "flextok.flextok_wrapper.FlexTok"


@pytest.mark.parametrize("text", ["1e-05", "None", "true", "a: b", "", " x", "'x'", "[1", "010", "12:30:45"])
def test_strings_that_read_as_something_else_are_quoted(text):
    assert parse_value(format_value(text)) == text


def test_a_config_longer_than_ten_thousand_characters_is_parsed():
    value = {f"module_{i}": {"read_key": "None_left", "dims": [1, 2, 3], "eps": 1e-06} for i in range(500)}
    text = format_value(value)
    assert len(text) > 30_000
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: null, b: [1, 2.5, true]}", {"a": None, "b": [1, 2.5, True]}),
        ("{a: None}", {"a": None}),
        ("2024-01-01", "2024-01-01"),
        ("a: [1", "a: [1"),
        ("{'a': 1,}", {"a": 1}),
        ("( 1 )", 1),
        ("{'a': __import__('os').system('true')}", {"a": "__import__('os').system('true')"}),
    ],
)
def test_text_from_other_hands_is_read_as_yaml_or_kept(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize(
    "value",
    [float("inf"), float("nan"), b"x", {1, 2}, 1j, pytest.param(object(), id="object"), [float("-inf")]],
    ids=repr,
)
def test_values_without_a_text_are_refused_on_writing(value):
    with pytest.raises(ValueError, match="cannot be written as text"):
        format_value(value)


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("text", [nested(MAX_DEPTH), "- " * (MAX_DEPTH - 1) + "[]"], ids=["literal", "yaml"])
def test_the_deepest_allowed_text_is_read(text):
    assert isinstance(parse_value(text), list)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(MAX_DEPTH + 1), "deeper"),
        ("[" * 500_000, "deeper"),
        ("{'a':" * 100_000, "deeper"),
        ("(" * 300, "deeper"),
        ("- " * (MAX_DEPTH + 1), "deeper"),
        ("[x, " * 100, "deeper"),
        ("x" * (MAX_CHARS + 1), "characters"),
        ("[" + "1," * (MAX_CHARS // 2) + "]", "characters"),
        ("- a\n" * MAX_YAML_CHARS, "too long for YAML"),
        ("-" * 500_000 + "1", "too long for YAML"),
        ("1+" * 200_000 + "1", "too long for YAML"),
        ("a" + ".b" * 200_000, "too long for YAML"),
        ("9" * 5000, "digits"),
        ("{a: &x [1], b: [*x, *x]}", "anchors"),
        ("&a [&b [*a, *a], *b]", "anchors"),
        ("!!python/object/apply:os.system ['true']", "tags"),
        ("{a: !!python/name:os.system ''}", "tags"),
        ("!!binary aGVsbG8=", "tags"),
        ("{'a': [1, 2}", "neither"),
        ("[lambda: 0]: 1, {", "neither"),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_bombs_and_nonsense_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_value(text)
