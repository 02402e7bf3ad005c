"""The command `show-mask`: the mask of any trunk of any config, as text and as a picture."""

import re
from itertools import pairwise

import pytest
import torch
from PIL import Image

from flextok.attention.layout import SequenceLayout
from flextok.cli import main
from tests.attention.test_visualize import parsed
from tests.support import RECORDED, REPOSITORY
from tests.test_docs import blocks

# 4 patches and 16 registers.
TINY = ["model=tiny", "vae=pixel", "data=digits"]


def shown(capsys, *argv):
    """What was printed: the first line, the rows of the mask, and `{name: (first, last)}` of the segments."""
    assert main(["show-mask", *argv]) == 0
    text = capsys.readouterr().out
    found = re.findall(r"^S\d+ = (.*): tokens? (\d+)(?: to (\d+))?$", text, flags=re.MULTILINE)
    segments = {name: (int(first), int(last or first)) for name, first, last in found}
    return text.splitlines()[0], parsed(text), segments


def everything(capsys, *argv):
    """The whole mask, as a tensor."""
    title, (_, positions, cells), segments = shown(capsys, *argv, "--budget", "1000")
    assert positions == list(range(len(cells)))
    return title, torch.tensor(cells), segments


def test_dropped_registers_are_hidden(capsys):
    title, mask, segments = everything(capsys, *TINY, "dropout=attention_mask", "--keep-k", "3")
    assert title == "decoder, dec_seq_packer: 20 tokens, mask_mode=full"
    assert torch.equal(mask, SequenceLayout(((4, 16),), keep_last=(3,)).dense_mask())
    assert segments == {"patches": (0, 3), "registers kept": (4, 6), "registers dropped": (7, 19)}


def test_dropped_registers_are_left_out(capsys):
    _, mask, segments = everything(capsys, *TINY, "dropout=packed", "--keep-k", "3")
    assert mask.shape == (7, 7)
    assert mask.all()
    assert segments == {"patches": (0, 3), "registers kept": (4, 6)}


def test_dropped_registers_are_replaced(capsys):
    """In evaluation one mask token stands for all that are equal to it."""
    _, mask, segments = everything(capsys, *TINY, "dropout=mask_token", "--keep-k", "3")
    assert mask.all()
    assert segments == {"patches": (0, 3), "registers kept": (4, 6), "mask token, counts 13 times": (7, 7)}


def test_the_encoder_sees_the_image_and_earlier_registers(capsys):
    title, mask, segments = everything(capsys, *TINY, "--part", "encoder")
    assert title.startswith("encoder, enc_seq_packer: 20 tokens, mask_mode=causal_last")
    assert torch.equal(mask, SequenceLayout(((4, 16),), mode="causal_last").dense_mask())
    assert segments == {"patches": (0, 3), "registers": (4, 19)}


def test_in_training_the_encoder_leaves_out_what_the_decoder_will_drop(capsys):
    _, mask, segments = everything(capsys, *TINY, "--part", "encoder", "--keep-k", "3")
    assert torch.equal(mask, SequenceLayout(((4, 3),), mode="causal_last").dense_mask())
    assert segments == {"patches": (0, 3), "registers kept": (4, 6)}


def test_samples_share_a_row_and_do_not_see_each_other(capsys):
    padded = "model.decoder.module_dict.dec_seq_packer.pad_to_multiple=32"
    _, mask, segments = everything(
        capsys, *TINY, padded, "dropout=attention_mask", "--batch", "3", "--keep-k", "2,16,99"
    )
    expected = SequenceLayout(((4, 16),) * 3, keep_last=(2, 16, 99), total=64).dense_mask()
    assert torch.equal(mask, expected)
    assert list(segments) == [
        *("sample 1 patches", "sample 1 registers kept", "sample 1 registers dropped"),
        *("sample 2 patches", "sample 2 registers kept", "sample 3 patches", "sample 3 registers kept", "padding"),
    ]
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(segments.values()))
    assert segments["padding"] == (60, 63)


def test_without_keep_k_all_registers_are_kept(capsys):
    for dropout in ("mask_token", "attention_mask", "packed"):
        _, mask, segments = everything(capsys, *TINY, f"dropout={dropout}")
        assert mask.shape == (20, 20)
        assert mask.all()
        assert segments == {"patches": (0, 3), "registers": (4, 19)}


def test_long_rows_are_sampled_at_the_border_of_keep_k(capsys):
    release = ["model=flextok_d12_d12", "vae=kl", "data.image_size=256", "dropout=attention_mask"]
    title, (labels, positions, cells), _ = shown(capsys, *release, "--keep-k", "64")
    assert "512 tokens" in title
    assert len(positions) == 25
    assert {0, 255, 256, 319, 320, 511} <= set(positions)
    assert [label for label in labels if label] == ["S1", "E1", "S2", "E2", "S3", "E3"]
    assert cells[0] == [position < 320 for position in positions]


def test_png(capsys, tmp_path):
    path = tmp_path / "pictures" / "mask.png"
    main(["show-mask", *TINY, "--part", "encoder", "--png", str(path)])
    assert capsys.readouterr().out.splitlines()[-1] == f"-> {path}"
    with Image.open(path) as image:
        assert image.format == "PNG"


def test_the_mask_of_an_exported_model(capsys):
    _, mask, segments = everything(capsys, str(RECORDED / "tiny_attn_masked.safetensors"), "--keep-k", "5")
    assert int(mask.any(-1).sum()) == segments["registers kept"][1] + 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keep-k", "1,2"], "--keep-k has 2 numbers for a batch of 1; valid: one for all samples, or one for each"),
        (["--batch", "0"], "--batch 0: valid is 1 sample or more"),
        (["--budget", "0"], "budget=0; valid: 1 position or more"),
        (
            ["~model.encoder.module_dict.enc_dropout_sampler", "--part", "encoder", "--keep-k", "1"],
            "--keep-k: the encoder has no nested dropout",
        ),
        (["~model.encoder.module_dict.enc_seq_packer", "--part", "encoder"], "the encoder has no packer"),
        (["model.decoder.module_dict.dec_from_latents.read_key=unheard_of"], "'unheard_of' is read by"),
        (["model=tinny"], "tinny"),
        (["no/such/path"], "neither an existing path nor an override"),
    ],
)
def test_mistakes_are_one_line_and_status_1(argv, message, capsys):
    assert main(["show-mask", *TINY, *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("numbers", ["a", "1,", "-1", "1.5", ""])
def test_keep_k_wants_whole_numbers(numbers, capsys):
    with pytest.raises(SystemExit) as end:
        main(["show-mask", f"--keep-k={numbers}"])
    assert end.value.code == 2
    assert "valid are whole numbers" in capsys.readouterr().err


def test_the_masks_in_the_documents_are_the_real_ones(capsys, tmp_path, monkeypatch):
    """Each text in docs/masks.md is what the `show-mask` command or the Python code before it prints."""
    monkeypatch.chdir(tmp_path)
    shown_in_document = blocks(REPOSITORY / "docs" / "masks.md")
    checked = 0
    for (language, source), (next_language, printed) in pairwise(shown_in_document):
        if next_language != "text":
            continue
        if language == "sh":
            assert main(source.split()[3:]) == 0
        else:
            exec(compile(source, "docs/masks.md", "exec"), {})
        real = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("->")]
        assert printed.splitlines() == real, source
        checked += 1
    assert checked == sum(language == "text" for language, _ in shown_in_document) > 2
