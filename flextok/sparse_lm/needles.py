"""Needles in haystacks: a fact somewhere in a text that the model has to know at the end of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import TYPE_CHECKING

from flextok.seeding import mixed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "{key} {value}\n"
_WORDS = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvz", "aeiou")]
Random(0).shuffle(_WORDS)
KEYS, VALUES = _WORDS[:32], _WORDS[32:64]
"""Made-up words; a model that knows them all guesses a value right once in 32."""
# Short passages are learned from first; in long ones a fact is far away.
_NUM_FACTS = (2, 3, 4, 6, 8, 12)


def needle_text(num_passages: int, seed: int) -> str:
    """Passages of facts, each stated and then repeated three times as often: text that teaches to look facts up.

    Every fact is a line, `{key} {value}`; a passage has 2 to 12 keys, an empty line ends it.
    """
    random = Random(mixed_seed(seed, "needle text"))
    return "\n".join(_passage(random) for _ in range(num_passages))


def _passage(random: Random) -> str:
    facts = [
        TEMPLATE.format(key=key, value=random.choice(VALUES)) for key in random.sample(KEYS, random.choice(_NUM_FACTS))
    ]
    return "".join([*facts, *random.choices(facts, k=3 * len(facts))])


@dataclass(frozen=True)
class Needle:
    """A prompt that ends with a question, and its answer, as token ids."""

    prompt: list[int]
    answer: list[int]


def make_needles(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    depth: float,
    count: int,
    seed: int,
    template: str = TEMPLATE,
) -> list[Needle]:
    """Prompts of at most `length` tokens of the text with a fact at `depth`, 0 its beginning and 1 its end.

    Which part of the text and which fact follow from the seed and the place in the list, so that depths compare.

    Raises:
        ValueError: a template without {key} before {value}, a depth that is none, a text or length that is too short.
    """
    if not 0 <= template.find("{key}") < template.find("{value}"):
        raise ValueError(f"needle template {template!r}: valid is a text with {{key}} and then {{value}}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth}: it must be in [0, 1]")
    lines = re.findall(r"[^\n.!?]*[\n.!?]+[ \t]*|[^\n.!?]+$", text)
    sizes = [len(tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]) for line in lines]
    needles = []
    for number in range(count):
        random = Random(mixed_seed(seed, "needle", length, number))
        key, value = random.choice(KEYS), random.choice(VALUES)
        fact = template.format(key=key, value=value)
        question, answer = _split(template, key, value)
        room = length - len(tokenizer(fact + question)["input_ids"])
        chosen = _consecutive(lines, sizes, room, random, without=key)
        place = round(depth * len(chosen))
        prompt = "".join([*chosen[:place], fact, *chosen[place:], question])
        needles.append(
            Needle(
                # Tokens at seams may differ from those of parts: never longer than asked.
                tokenizer(prompt, verbose=False)["input_ids"][-length:],
                tokenizer(answer, add_special_tokens=False)["input_ids"],
            )
        )
    return needles


def _split(template: str, key: str, value: str) -> tuple[str, str]:
    """What comes before the value, without a space at its end, and the value with that."""
    before = template[: template.find("{value}")]
    question = before.rstrip()
    return question.format(key=key), before[len(question) :] + value


def _consecutive(lines: Sequence[str], sizes: Sequence[int], room: int, random: Random, without: str) -> list[str]:
    """Lines one after another, from anywhere, that fill `room` tokens and do not hold a word."""
    start, chosen, used = random.randrange(len(lines)), list[str](), 0
    for step in range(len(lines)):
        place = (start + step) % len(lines)
        if without in lines[place]:
            continue
        if used + sizes[place] > room:
            break
        used += sizes[place]
        chosen.append(lines[place])
    if room < 1 or used < room / 2:
        raise ValueError(
            f"needles of {room} tokens of text cannot be made: it is too short, or its sentences are too long"
        )
    return chosen
