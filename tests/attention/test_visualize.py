"""Pictures of masks: which positions are shown, what the text says, what the PNG holds."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flextok.attention.layout import SequenceLayout
from flextok.attention.masks import causal_mask, create_flex_attention_mask, materialize
from flextok.attention.visualize import LEGEND, render_mask, sample_positions, save_mask_png
from tests.attention.recorded_segments import segment_cases, segment_tensors, visual_cases

each_visual = pytest.mark.parametrize("case", visual_cases(), ids=lambda case: f"{case['length']}_{case['budget']}")


def causal(length):
    return materialize(causal_mask(), 1, 1, length, length)[0, 0]


def parsed(text):
    """`(labels, positions, cells)` of the rows: lines with cells in them, of which the legend is none."""
    rows = [line.split() for line in text.splitlines() if set("■·") & set(line) and "=" not in line]
    first = [next(i for i, word in enumerate(row) if word in "■·") for row in rows]
    labels = [row[0] if start == 2 else "" for row, start in zip(rows, first, strict=True)]
    positions = [int(row[start - 1]) for row, start in zip(rows, first, strict=True)]
    return labels, positions, [[cell == "■" for cell in row[start:]] for row, start in zip(rows, first, strict=True)]


# --- positions --------------------------------------------------------------------------------------------------------


@each_visual
def test_recorded_positions(case):
    arguments = case["length"], case["spans"], case["fusion_start"], case["budget"]
    assert sample_positions(*arguments) == case["positions"]


@each_visual
def test_recorded_labels(case):
    text = render_mask(causal(case["length"]), case["spans"], case["fusion_start"], case["budget"])
    labels, positions, _ = parsed(text)
    assert labels == case["labels"]
    assert positions == case["positions"]


@st.composite
def pictures(draw):
    length = draw(st.integers(1, 200))
    borders = sorted(draw(st.sets(st.integers(0, length), max_size=12)))
    segments = list(zip(borders[::2], borders[1::2], strict=False))
    return length, segments, draw(st.none() | st.integers(0, length)), draw(st.integers(1, 40))


@given(pictures())
def test_as_many_positions_as_fit_in_order_and_inside(picture):
    length, segments, fusion_start, budget = picture
    positions = sample_positions(*picture)
    assert positions == sorted(set(positions))
    assert len(positions) == min(length, budget)
    assert set(positions) <= set(range(length))
    if fusion_start is not None and fusion_start < length:
        assert fusion_start in positions
    borders = {position for start, end in segments for position in (start, end - 1)}
    if len(borders) < budget:
        assert borders <= set(positions)


def test_an_even_choice_keeps_both_ends():
    spans = [(10 * i, 10 * i + 10) for i in range(8)]
    assert sample_positions(80, spans, budget=4) == [0, 29, 50, 79]
    assert sample_positions(80, spans, budget=1) == [0]


def test_without_segments_the_row_is_halved_from_its_end():
    assert sample_positions(100, (), budget=4) == [24, 49, 74, 99]


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_small_mask_written_out():
    """Two patches and three registers of which one is kept: the border at keep_k is one between segments."""
    mask = SequenceLayout(((2, 3),), keep_last=(1,)).dense_mask()
    assert render_mask(mask, [(0, 2), (2, 3), (3, 5)]).splitlines() == [
        "      S1 E1 S2 S3 E3",
        "       0  1  2  3  4",
        "S1  0  ■  ■  ■  ·  ·",
        "E1  1  ■  ■  ■  ·  ·",
        "S2  2  ■  ■  ■  ·  ·",
        "S3  3  ·  ·  ·  ·  ·",
        "E3  4  ·  ·  ·  ·  ·",
        LEGEND,
    ]


@pytest.mark.parametrize("case", segment_cases(), ids=lambda case: case["name"])
def test_text_shows_the_elements_of_the_mask(case):
    mask = segment_tensors()[f"{case['name']}.mask.self.visible"]
    _, positions, cells = parsed(render_mask(mask, case["spans"], case["fusion_start"]))
    assert len(positions) == min(25, len(mask))
    assert torch.equal(torch.tensor(cells), mask[positions][:, positions])


def test_columns_are_as_wide_as_the_largest_number():
    text = render_mask(causal(1200), [(0, 600), (600, 1200)], budget=6)
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1
    assert "1199" in text.splitlines()[1].split()
    assert parsed(text)[1][-1] == 1199


# --- PNG --------------------------------------------------------------------------------------------------------------


def channels(image, box=(0, 0, 1, 1)):
    """Red, green and blue of the pixels of `box`, which is in fractions of the picture."""
    left, top, right, bottom = (int(part * size) for part, size in zip(box, image.size * 2, strict=True))
    return torch.from_numpy(np.array(image.convert("RGB")))[top:bottom, left:right].unbind(-1)


def share_of_allowed(image, box):
    red, _, blue = channels(image, box)
    return ((red < 80) & (blue > 80)).float().mean()


def test_png_draws_what_is_allowed(tmp_path):
    path = save_mask_png(causal(64), tmp_path / "new" / "folder" / "causal.png")
    assert path == tmp_path / "new" / "folder" / "causal.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert share_of_allowed(image, (0.2, 0.6, 0.4, 0.8)) == 1, "below the diagonal"
        assert share_of_allowed(image, (0.6, 0.2, 0.8, 0.4)) == 0, "above it"
    assert [file.name for file in path.parent.iterdir()] == ["causal.png"]


def test_png_marks_segments_and_the_start_of_fusion(tmp_path):
    mask = materialize(create_flex_attention_mask([(0, 8), (8, 16)], 16), 1, 1, 20, 20)[0, 0]
    plain = save_mask_png(mask, tmp_path / "plain.png")
    marked = save_mask_png(
        mask, str(tmp_path / "marked.png"), [(0, 8), (8, 16)], 16, names=["first", "second"], title="two texts", dpi=80
    )
    assert plain.read_bytes() != marked.read_bytes()
    with Image.open(marked) as image:
        red, green, _ = channels(image)
    assert ((red > 180) & (green < 100)).sum() > 50


def test_a_picture_needs_no_display_and_matplotlib_only_when_it_is_drawn(tmp_path):
    program = (
        "import sys, torch\n"
        "from flextok.attention.visualize import render_mask, save_mask_png\n"
        "render_mask(torch.ones(3, 3, dtype=torch.bool))\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"save_mask_png(torch.ones(3, 3, dtype=torch.bool), {str(tmp_path / 'mask.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"MPLBACKEND": "TkAgg", "HOME": str(tmp_path)})


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (causal(4).int(), {}, r"mask is torch.int32 \[4, 4\]"),
        (causal(4)[:3], {}, r"mask is torch.bool \[3, 4\]"),
        (causal(4)[None], {}, r"mask is torch.bool \[1, 4, 4\]"),
        (causal(4)[:0, :0], {}, "not empty"),
        (causal(4), {"segments": [(0, 2), (3, 3)]}, r"segments\[1\]=\(3, 3\)"),
        (causal(4), {"segments": [(2, 5)]}, "length 4"),
        (causal(4), {"fusion_start": 5}, "fusion_start=5; valid: 0 to 4"),
    ],
)
def test_mistakes_name_the_field_and_what_is_valid(mask, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        render_mask(mask, **arguments)
    with pytest.raises(ValueError, match=message):
        save_mask_png(mask, tmp_path / "mask.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_budget_and_names(tmp_path):
    with pytest.raises(ValueError, match="budget=0; valid: 1 position or more"):
        render_mask(causal(4), budget=0)
    with pytest.raises(ValueError, match="names has 1 entries; valid: one for each of the 2 segments"):
        save_mask_png(causal(4), tmp_path / "mask.png", [(0, 2), (2, 4)], names=["a"])
