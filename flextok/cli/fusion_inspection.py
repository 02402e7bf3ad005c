"""What is to be seen of one fused prompt and its answer."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flextok.evaluation.plot import COLOURS, panels
from flextok.utils.checkpoint import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

    from flextok.fusion.answerer import Answerer
    from flextok.fusion.packing import PackedPrompt
    from flextok.fusion.prompts import PromptTexts

GAPS, JOINED = "separators", "tail and answer"
# Columns of a terminal.
_BAR = 40


@dataclass(frozen=True)
class Inspection:
    """One prompt, read and answered."""

    text: str
    """The tokens of the prompt as text."""
    parts: list[tuple[str, tuple[int, int]]]
    """Name and span of the prefix, if there is one, and of each wording."""
    wordings: list[str]
    fusion_start: int
    answer: str
    mask: "Tensor"
    """bool `[length, length]` of the prompt and the answer."""
    mass: "Tensor"
    """float32 `[layers, tokens of the answer, parts + 2]`: attention paid to parts, separators, and what follows."""

    def groups(self) -> list[tuple[str, list[float]]]:
        """What attention is paid to, with its share in each layer; separators only where there are any."""
        names = [*(name for name, _ in self.parts), GAPS, JOINED]
        shares = self.mass.mean(1).T.tolist()
        return [(name, row) for name, row in zip(names, shares, strict=True) if name != GAPS or max(row) > 0]


def inspect(answerer: "Answerer", question: "PromptTexts", weights: Sequence[float] | None) -> Inspection:
    """Answer one question by fusion and look at it; ValueError as of `Answerer.answer`."""
    from flextok.fusion.attention import FusionMask
    from flextok.fusion.batch import left_padded
    from flextok.fusion.mass import attention_mass

    prompt = answerer.packed(question)
    [tokens] = answerer.generated([prompt], None if weights is None else [weights])
    gap_keys = answerer.options.gap_keys
    batch = left_padded([prompt], pad_token_id=0, device=prompt.input_ids.device)
    length = len(prompt) + len(tokens)
    return Inspection(
        text=str(answerer.tokenizer.decode(prompt.input_ids)),
        parts=_parts(prompt),
        wordings=question.wordings,
        fusion_start=prompt.fusion_start,
        answer=str(answerer.tokenizer.decode(tokens, skip_special_tokens=True)),
        mask=FusionMask(batch, len(tokens), gap_keys=gap_keys).dense(length, length)[0, 0],
        mass=attention_mass(answerer.model, prompt, tokens, gap_keys=gap_keys, weights=weights).cpu(),
    )


def describe_spans(found: Inspection) -> str:
    """A line for each part of the prompt."""
    lines = [
        f"S{number} = {name}: tokens {start} to {end - 1}" for number, (name, (start, end)) in enumerate(found.parts, 1)
    ]
    return "\n".join([*lines, f"G0 = token {found.fusion_start}, the first that sees all of them"])


def describe_mass(found: Inspection) -> str:
    """Shares of attention as bars of text."""
    groups = [(name, sum(row) / len(row)) for name, row in found.groups()]
    width = max(len(name) for name, _ in groups)
    lines = [f"{name:<{width}}  {share:6.1%}  {'█' * round(share * _BAR)}".rstrip() for name, share in groups]
    return "\n".join(["attention of the answer", *lines])


def save_mass_png(found: Inspection, path: Path) -> Path:
    """Write shares of attention as bars, the mean over layers, with a dot for each layer."""
    groups = found.groups()
    figure, [axes] = panels(1)
    figure.set_size_inches(7.5, 1.2 + 0.42 * len(groups))
    # What is no wording is grey.
    names = [name for name, _ in groups]
    wordings = iter(found.wordings)
    labels = [f"{name}\n{_shortened(next(wordings))}" if _is_wording(name) else name for name in names]
    colours = [COLOURS[0] if _is_wording(name) else "#aaaaaa" for name in names]
    axes.barh(range(len(groups)), [sum(row) / len(row) for _, row in groups], height=0.62, color=colours)
    for place, (_, row) in enumerate(groups):
        label = "one layer" if place == 0 else None
        axes.plot(row, [place] * len(row), "o", markersize=3.5, color=COLOURS[1], alpha=0.8, label=label)
    axes.set_yticks(range(len(groups)), labels, fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    axes.set_xlabel("share of attention; bars: mean over layers")
    axes.set_title(f"answer: {_shortened(found.answer)}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    for text in (axes.title, *axes.get_yticklabels()):
        text.set_parse_math(False)  # a question may have dollars in it
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # A letter that the font lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    return path


def _parts(prompt: "PackedPrompt") -> list[tuple[str, tuple[int, int]]]:
    names: list[str] = ["prefix"] * prompt.has_prefix
    names += [f"wording {number}" for number in range(1, len(prompt.wording_spans) + 1)]
    return list(zip(names, prompt.spans, strict=True))


def _is_wording(name: str) -> bool:
    return name.startswith("wording")


def _shortened(text: str, length: int = 60) -> str:
    text = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    return text if len(text) <= length else f"{text[: length - 1]}…"
