"""How an item is worded as a prompt, in the two styles of the data sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from flextok.fusion.items import Item

if TYPE_CHECKING:
    import torch

WEBQA_INSTRUCTION = "Answer the question based on general world knowledge. Provide a short and direct answer."
MYRIAD_INSTRUCTION = "Predict the [MASK] in the sentence in one word."
TAIL = "\nA:"

Role = tuple[str, int | None, int | None]
"""What a segment is: `instruction`, `few_shot_q`, `few_shot_a` or `question`; of which example; which wording."""


@dataclass(frozen=True)
class PromptTexts:
    """The prompts of one item, in parts that can be packed with or without a shared prefix.

    Attributes:
        prefix: Instruction and examples with the blank line before the question; "" if there is neither.
        wordings: One question each, such as `Q: who wrote it?`.
        tail: The cue for the answer.
    """

    prefix: str
    wordings: list[str]
    tail: str = TAIL

    def full(self) -> list[str]:
        """A complete prompt for each wording."""
        return [f"{self.prefix}{wording}{self.tail}" for wording in self.wordings]


class PromptStyle(Protocol):
    """What a data source says about wording prompts and reading answers."""

    def texts(self, wordings: Sequence[str], examples: Sequence[Item]) -> PromptTexts:
        """The prompts of the wordings of one item, after these examples."""

    def prediction(self, generation: str) -> str:
        """The answer within the text that was generated."""


class WebQAPrompts:
    """Each example is one question and its first answer; an answer is a line.

    Args:
        instruction: What comes first; "" for none, None for that of the data set.
    """

    def __init__(self, *, instruction: str | None = None) -> None:
        self.instruction = WEBQA_INSTRUCTION if instruction is None else instruction

    def texts(self, wordings: Sequence[str], examples: Sequence[Item]) -> PromptTexts:
        """The prompts of the wordings of one item, after these examples."""
        shown = [f"Q: {example.paraphrases[0]}\nA: {example.answers[0]}" for example in examples]
        return PromptTexts(_prefix(self.instruction, shown), [f"Q: {wording}" for wording in wordings])

    def prediction(self, generation: str) -> str:
        """The first line."""
        return first_line(generation)


class MyriadPrompts:
    """Each example is all its wordings and its first answer; an answer is a word.

    Args:
        instruction: What comes first; "" for none, None for that of the data set.
    """

    def __init__(self, *, instruction: str | None = None) -> None:
        self.instruction = MYRIAD_INSTRUCTION if instruction is None else instruction

    def texts(self, wordings: Sequence[str], examples: Sequence[Item]) -> PromptTexts:
        """The prompts of the wordings of one item, after these examples."""
        shown = ["\n".join(_example_lines(example.paraphrases, example.answers[0])) for example in examples]
        return PromptTexts(_prefix(self.instruction, shown), [f"Q: {wording}" for wording in wordings])

    def prediction(self, generation: str) -> str:
        """The first word."""
        return next(iter(generation.split()), "")


def webqa_prompt(question: str, examples: Sequence[tuple[str, str]]) -> str:
    """One full prompt; examples are pairs of a question and its answer."""
    items = [Item(str(number), [answer], [text]) for number, (text, answer) in enumerate(examples)]
    return WebQAPrompts().texts([question], items).full()[0]


def myriad_segments(
    paraphrases: Sequence[str],
    examples: Sequence[tuple[Sequence[str], str]],
    *,
    instruction: str = MYRIAD_INSTRUCTION,
) -> tuple[list[str], list[Role]]:
    """The prompt as segments, each line its own, and the role of each; the cue for the answer is left to the tail.

    Args:
        paraphrases: The wordings of the question, without `Q: `.
        examples: Pairs of wordings and an answer.
        instruction: The first segment; "" for none.

    Raises:
        ValueError: There is no wording, of the question or of an example.
    """
    if not paraphrases or not all(wordings for wordings, _ in examples):
        raise ValueError("the question and each example need at least one wording")
    segments: list[tuple[str, Role]] = [(instruction, ("instruction", None, None))] if instruction else []
    for number, (wordings, answer) in enumerate(examples):
        roles: list[Role] = [("few_shot_q", number, wording) for wording in range(len(wordings))]
        segments += zip(_example_lines(wordings, answer), [*roles, ("few_shot_a", number, None)], strict=True)
    segments += [(f"Q: {text}", ("question", None, wording)) for wording, text in enumerate(paraphrases)]
    return [text for text, _ in segments], [role for _, role in segments]


def myriad_adjacency(roles: Sequence[Role]) -> "torch.Tensor":
    """Which segment (row) may attend to which (column), `[segments, segments]` bool.

    Raises:
        ValueError: A role is unknown.
    """
    import torch

    for kind, *_ in roles:
        if kind not in _SEES:
            raise ValueError(f"role {kind!r} is unknown; valid: {', '.join(_SEES)}")
    rows = [[_sees(i, j, query, key) for j, key in enumerate(roles)] for i, query in enumerate(roles)]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(roles), len(roles))


# Beside itself. Questions of one example do not see each other, whatever this says.
_SEES = {
    "instruction": {"instruction"},
    "few_shot_q": {"instruction", "few_shot_q"},
    "few_shot_a": {"instruction", "few_shot_q", "few_shot_a"},
    "question": {"instruction", "few_shot_q", "few_shot_a"},
}


def _sees(i: int, j: int, query: Role, key: Role) -> bool:
    same_example = query[0] == key[0] == "few_shot_q" and query[1] == key[1]
    return i == j or (key[0] in _SEES[query[0]] and not same_example)


def first_line(text: str) -> str:
    """What comes before the first newline, stripped."""
    return text.partition("\n")[0].strip()


def _example_lines(wordings: Sequence[str], answer: str) -> list[str]:
    return [*(f"Q: {wording}" for wording in wordings), f"A: {answer}"]


def _prefix(instruction: str, examples: Sequence[str]) -> str:
    return "".join(f"{block}\n\n" for block in [instruction, *examples] if block)
