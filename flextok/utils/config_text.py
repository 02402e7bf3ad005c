"""One config value as text and back: the form in which a checkpoint's metadata stores its config.

A value is written as `str(value)`, so it is read back as a Python literal. The reader below is our own and
not `ast.literal_eval`: the syntax tree of a hostile megabyte can take gigabytes or overflow the stack, while
this reader knows six kinds of values, counts its depth as it goes and needs memory in proportion to the text.
Text that is no literal is read as YAML (files written by hand), and what is neither is plain text, such as
the bare dotted path of `_target_`.
"""

import math
import re
from typing import Any

import yaml

MAX_CHARS = 1_000_000
MAX_DEPTH = 32
# The YAML reader is slow, and only files written by hand need it.
MAX_YAML_CHARS = 100_000

_SPACE = re.compile(r"[ \t\r\n]*")
_STRING = re.compile(r"""'[^'\\\n]*(?:\\.[^'\\\n]*)*'|"[^"\\\n]*(?:\\.[^"\\\n]*)*\"""")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_INT = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?![0-9.eE_xobXOBjJ])")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?(?![0-9.eE_jJ])")
_NAME = re.compile(r"(?:None|True|False)(?!\w)")
_NAMES = {"None": None, "True": True, "False": False}
_SIMPLE_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "r": "\r", "t": "\t"}


def format_value(value: Any) -> str:
    """The metadata text of one plain config value: `str(value)` wherever `parse_value` gives the value back.

    A string that reads as something else (`"1e-05"`, `"None"`, `"a: b"`) is quoted. Raises ValueError for a
    value that no text gives back (infinities, NaN, other types) and for one too large or too deep to be read
    again.
    """
    candidates = (str(value), repr(value)) if isinstance(value, str) else (str(value),)
    reason = "it reads back as something else"
    for text in candidates:
        try:
            if _same(parse_value(text), value):
                return text
        except ValueError as error:
            reason = str(error)
    raise ValueError(f"cannot be written as text: {reason}; use strings, finite numbers, booleans, None and containers")


def parse_value(text: str) -> Any:
    """The value that a metadata text stands for: a Python literal, else YAML, else the text itself.

    Raises ValueError if the text is longer than `MAX_CHARS` or nested deeper than `MAX_DEPTH`, if it is YAML
    with anchors, aliases or tags, or if it opens a container that cannot be read.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text):,} characters of text; at most {MAX_CHARS:,} are read")
    try:
        return _LiteralReader(text).read()
    except _NotALiteral as not_literal:
        if len(text) > MAX_YAML_CHARS:
            raise ValueError(f"no Python literal ({not_literal}), and too long for YAML") from not_literal
        try:
            return _read_yaml(text)
        except yaml.YAMLError:
            if text.lstrip()[:1] in ("{", "[", "("):
                raise ValueError(f"neither a Python literal ({not_literal}) nor YAML") from not_literal
            return text


class _NotALiteral(Exception):
    """The text is not a Python literal; it may still be YAML or plain text."""


class _LiteralReader:
    """Reads strings, numbers, None, booleans, lists, tuples and dicts."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def read(self) -> Any:
        value = self._value(depth=0)
        if self._peek():
            raise self._error("something follows the value")
        return value

    def _value(self, depth: int) -> Any:
        char = self._peek()
        if char and char in "[({":
            if depth >= MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            self.position += 1
            return self._dict(depth + 1) if char == "{" else self._sequence(char, depth + 1)
        return self._scalar()

    def _scalar(self) -> Any:
        try:
            if token := self._take(_STRING):
                return _ESCAPE.sub(_unescape, token[1:-1])
            if token := self._take(_NAME):
                return _NAMES[token]
            if token := self._take(_INT):
                return int(token)
            if token := self._take(_FLOAT):
                return float(token)
        except ValueError as error:  # unknown escapes, numbers with thousands of digits
            raise self._error(str(error)) from error
        raise self._error("no value")

    def _sequence(self, opening: str, depth: int) -> Any:
        closing = "]" if opening == "[" else ")"
        items: list[Any] = []
        comma = True
        while self._peek() != closing:
            if not comma:
                raise self._error("no comma")
            items.append(self._value(depth))
            comma = self._skip(",")
        self.position += 1
        if opening == "(" and len(items) == 1 and not comma:
            return items[0]
        return items if opening == "[" else tuple(items)

    def _dict(self, depth: int) -> dict[Any, Any]:
        items: dict[Any, Any] = {}
        comma = True
        while self._peek() != "}":
            if not comma:
                raise self._error("no comma")
            key = self._scalar_key()
            if not self._skip(":"):
                raise self._error("no colon")
            items[key] = self._value(depth)
            comma = self._skip(",")
        self.position += 1
        return items

    def _scalar_key(self) -> Any:
        self._peek()
        return self._scalar()

    def _peek(self) -> str:
        match = _SPACE.match(self.text, self.position)
        assert match is not None
        self.position = match.end()
        return self.text[self.position : self.position + 1]

    def _skip(self, char: str) -> bool:
        found = self._peek() == char
        self.position += found
        return found

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match.group()

    def _error(self, reason: str) -> _NotALiteral:
        return _NotALiteral(f"{reason} at character {self.position}")


def _unescape(match: re.Match[str]) -> str:
    escape = match.group(1)
    if escape in _SIMPLE_ESCAPES:
        return _SIMPLE_ESCAPES[escape]
    if len(escape) > 1:
        try:
            return chr(int(escape[1:], 16))
        except OverflowError as error:
            raise ValueError(f"no such character: {match.group()}") from error
    raise ValueError(f"unknown escape {match.group()}")


class _PlainYamlLoader(yaml.SafeLoader):
    """YAML without dates, and with Python's spelling of null."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_PlainYamlLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^None$"), ["N"])


def _read_yaml(text: str) -> Any:
    # Events come one at a time and without recursion, so that bombs are found before anything is built.
    depth = 0
    for event in yaml.parse(text, Loader=_PlainYamlLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ValueError("YAML anchors and aliases are not allowed")
        if getattr(event, "tag", None) is not None:
            raise ValueError("YAML tags are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return yaml.load(text, Loader=_PlainYamlLoader)


def _same(left: Any, right: Any) -> bool:
    """Equal in value and in the type of every part: 1, 1.0 and True are three values."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float):
        return left == right and math.copysign(1.0, left) == math.copysign(1.0, right)
    return bool(left == right)
