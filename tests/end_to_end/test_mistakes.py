"""What cannot work ends within seconds in one line that names the setting, its value and what would be valid."""

import shutil

import pytest

from flextok import FlexTokFromHub
from tests.end_to_end.support import evaluate, train
from tests.support import python

KL = ("vae=kl", "latent.channels=4", "size.patch=2", "data.image_size=64")

# Strict: whoever mends the message removes the mark.


def last_line(*arguments):
    """The last line of what `train.py` writes to stderr when it refuses to start."""
    done = python("train.py", *arguments, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), done.stderr
    return line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["validation.keep_ks=[1,17]"], ["validation.keep_ks=[1, 17]", "integers from 1 to 16 (size.registers)"]),
        (["size.registers=4", "callbacks.pictures.keep_ks=[5]"], ["callbacks.pictures.keep_ks=[5]", "from 1 to 4"]),
        (["data.image_size=18"], ["data.image_size=18", "a multiple of 4", "size.patch=4"]),
        ([*KL, "latent.path=x", "data.image_size=72"], ["data.image_size=72", "a multiple of 16"]),
        (["data=image_folder"], ["data.root is missing", "a folder with images"]),
        (["data=image_folder", "data.root=no/such/images"], ["data.root='no/such/images'", "an existing path"]),
        (["ckpt_path=no/such/run"], ["ckpt_path='no/such/run'", "an existing path"]),
        (["init_from=no/such/file.safetensors"], ["init_from='no/such/file.safetensors'", "an existing path"]),
        ([*KL], ["latent.path is missing", "the local folder of a diffusers AutoencoderKL"]),
        ([*KL, "latent.path=./no/vae"], ["latent.path='./no/vae'", "the local folder of a diffusers AutoencoderKL"]),
        (["trainer.max_steps=60"], ["optimizer.warmup_steps=100", "0 to 59"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_impossible_settings_are_refused(arguments, expected, tmp_path):
    line = last_line("experiment=digits", *arguments, f"paths.runs={tmp_path / 'runs'}")
    assert all(part in line for part in expected), line


def test_levels_other_than_those_of_the_start_weights_are_refused(released, tmp_path):
    weights = released("mask_token")[1] / "model.safetensors"
    options = (f"init_from={weights}", "size.levels=[8,5,5]", f"paths.runs={tmp_path / 'runs'}")
    line = last_line("experiment=digits", *options)
    expected = (f"init_from='{weights}'", "levels [8, 8, 8, 5, 5, 5]", "[8, 5, 5]", "valid: the same levels")
    assert all(part in line for part in expected), line


@pytest.mark.parametrize("override", ["dropout=attention_mask", "size.registers=8"])
def test_another_model_than_that_of_the_run_is_not_resumed(override, released, tmp_path):
    run, _ = released("mask_token")
    with pytest.raises(ValueError, match="ckpt_path"):
        train(tmp_path / "resumed", "experiment=digits", override, f"ckpt_path={run}")


def test_resuming_from_a_damaged_checkpoint_is_refused_on_one_line(released, tmp_path):
    content = (released("mask_token")[0] / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(content[:-1])
    line = last_line("experiment=digits", f"ckpt_path={tmp_path / 'last.ckpt'}", f"paths.runs={tmp_path}")
    assert "last.ckpt cannot be read" in line


def test_a_checkpoint_alone_is_evaluated_as_in_its_run(released, tmp_path):
    run, _ = released("mask_token")
    alone = shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path)
    in_run = evaluate(run / "checkpoints" / "last.ckpt", tmp_path / "in_run")
    for name, options in (("its own data", ()), ("chosen data", ("data=digits",))):
        metrics = evaluate(alone, tmp_path / name, *options)
        assert [row["psnr"] for row in metrics["results"]] == [row["psnr"] for row in in_run["results"]]


def test_larger_images_than_those_of_the_run_are_refused(released, tmp_path):
    run, _ = released("mask_token")
    message = (
        r"data.image_size=32 cannot be used; valid: 8 \(the size the model was trained at\) or smaller multiples of"
    )
    for checkpoint in (run, shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path)):
        with pytest.raises(ValueError, match=message):
            evaluate(checkpoint, tmp_path / "evaluation", "data=photos")


def length_of_header(content):
    return 8 + int.from_bytes(content[:8], "little")


DAMAGES = {
    "empty": lambda content: b"",
    "cut in the header": lambda content: content[: length_of_header(content) // 2],
    "cut in the weights": lambda content: content[: (length_of_header(content) + len(content)) // 2],
    "last byte missing": lambda content: content[:-1],
    "length flipped": lambda content: flipped(content, 3),
    "opening flipped": lambda content: flipped(content, 8),
    "config flipped": lambda content: flipped(content, content.index(b"causal_last")),
    "name flipped": lambda content: flipped(content, content.index(b"wq.weight")),
    "end of header flipped": lambda content: flipped(content, content.rindex(b"}", 0, length_of_header(content))),
}


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_export_is_named_by_whatever_reads_it(damage, released, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(released("mask_token")[1], folder, ignore=shutil.ignore_patterns("evaluation"))
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"export/model\.safetensors"):
        FlexTokFromHub.from_pretrained(folder)
    for checkpoint in (folder, file):
        with pytest.raises(ValueError, match=r"export/model\.safetensors"):
            evaluate(checkpoint, tmp_path / "evaluation", "data=digits")
    with pytest.raises(ValueError, match=r"export/model\.safetensors"):
        train(tmp_path / "tuned", "experiment=digits", f"init_from={file}")
    assert not any((tmp_path / name).exists() for name in ("tuned", "evaluation"))
