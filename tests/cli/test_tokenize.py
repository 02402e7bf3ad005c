"""`tokenize` and `detokenize`: ids come back as they were, whatever the batches and however often it was killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flextok import pictures
from flextok.cli import detokenize as detokenize_command
from flextok.cli import main, shard_folder, token_writer
from flextok.data import token_files
from flextok.data.token_shards import TokenShards
from flextok.data.transforms import decode, resize_shorter_center_crop, to_pil, to_tensor
from flextok.evaluation.reconstruction import image_metrics
from flextok.evaluation.source import find_source
from flextok.provenance import weights_sha256
from flextok.reconstruct import decode_tokens, encode_images
from tests.cli.test_prepare import make_tar
from tests.data_modules.images import noise_image, spoil, write_images
from tests.support import RECORDED, REPOSITORY, Interruptions, Killed, export_small_model

FORMATS = ("parquet", "webdataset")
each_format = pytest.mark.parametrize("form", FORMATS)


def run(*words):
    return main(["--traceback", *(str(word) for word in words)])


def tokenize(source, destination, model, *options):
    return run("tokenize", source, destination, "--checkpoint", model, "--shard-size", 8, "--workers", 0, *options)


def detokenize(source, destination, model, *options):
    return run("detokenize", source, destination, "--checkpoint", model, "--steps", 2, *options)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(folder):
    """`{key: ids}`; no key may occur twice."""
    samples = [*TokenShards(folder)]
    found = {sample["key"]: sample["ids"].tolist() for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 30)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, images, model):
    folder = tmp_path_factory.mktemp("tokens") / "tokens"
    assert tokenize(images, folder, model) == 0
    return folder


def encoded(model, images):
    """What the library makes of the images, all in one batch."""
    keys = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    squares = [to_tensor(resize_shorter_center_crop(decode(images / key), 8)) for key in keys]
    loaded = find_source(str(model), runs=images).load(weights="ema")[0]
    with torch.no_grad():
        return loaded, encode_images(loaded, torch.stack(squares), keys, seed=0)


# --- what comes out ---------------------------------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (7, 0), (32, 2)])
def test_ids_are_those_of_the_model_in_every_format_and_batch(form, batch_size, workers, images, model, tmp_path):
    options = ("--format", form, "--batch-size", batch_size, "--workers", workers, "--shard-size", 11)
    tokenize(images, tmp_path, model, *options)
    expected = encoded(model, images)[1]
    samples = [*TokenShards(tmp_path)]
    assert [sample["key"] for sample in samples] == expected.keys
    for sample, row in zip(samples, expected.tokens, strict=True):
        assert torch.equal(sample["ids"], row[0].long())
        assert (sample["height"], sample["width"]) == (10, 12)


def test_keep_k_stores_the_first_ids(images, model, tokens, tmp_path):
    tokenize(images, tmp_path, model, "--keep-k", 3)
    assert TokenShards(tmp_path).metadata["keep_k"] == 3
    assert ids(tmp_path) == {key: row[:3] for key, row in ids(tokens).items()}


def test_the_index_says_how_tokens_were_made(model, tokens, capsys):
    metadata = TokenShards(tokens).metadata
    loaded = find_source(str(model), runs=tokens).load(weights="ema")[0]
    assert metadata["model"] == {
        "weights_sha256": weights_sha256(loaded),
        "num_registers": 8,
        "codebook_size": 64000,
        "levels": [8, 8, 8, 5, 5, 5],
    }
    assert (metadata["image_size"], metadata["keep_k"], metadata["seed"]) == (8, 8, 0)


def test_others_read_the_files_too(images, model, tokens, tmp_path):
    """Parquet as a table of pyarrow, tar files with the webdataset library."""
    import pyarrow.parquet
    import webdataset

    table = pyarrow.parquet.read_table(tokens / "tokens-000000.parquet")
    assert dict(zip(*table.select(["key", "ids"]).to_pydict().values(), strict=True)).items() <= ids(tokens).items()
    assert json.loads(table.schema.metadata[b"flextok"]) == TokenShards(tokens).metadata
    tokenize(images, tmp_path, model, "--format", "webdataset")
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = [*webdataset.WebDataset(shards, shardshuffle=False).decode()]
    assert {sample["json"]["key"]: sample["npy"].tolist() for sample in read} == ids(tokens)
    assert {sample["json"]["model"] for sample in read} == {TokenShards(tokens).metadata["model"]["weights_sha256"]}


def test_tar_files_of_images_give_the_same_ids_but_for_the_seed_of_their_keys(images, model, tokens, tmp_path):
    keys = sorted(ids(tokens))
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars/a.tar", {key: (images / key).read_bytes() for key in keys})
    tokenize(tmp_path / "tars", tmp_path / "out", model)
    assert ids(tmp_path / "out") == {f"a.tar/{key}": row for key, row in ids(tokens).items()}


def test_a_run_and_its_export_are_one_model(run_folder, images, tmp_path):
    assert run("export", run_folder, tmp_path / "export") == 0
    tokenize(images, tmp_path / "of_run", run_folder)
    tokenize(images, tmp_path / "of_export", tmp_path / "export")
    assert content(tmp_path / "of_run") == content(tmp_path / "of_export")
    with pytest.raises(ValueError, match=r"model.weights_sha256="):
        tokenize(images, tmp_path / "of_run", run_folder, "--weights", "raw")


def test_what_a_vae_draws_depends_on_the_seed_and_not_on_the_batch(tmp_path):
    write_images(tmp_path / "images", 6)
    vae = ("vae=kl", f"latent.path={RECORDED / 'tiny_vae'}", "latent.channels=4", "data.image_size=32", "size.patch=2")
    model = export_small_model(tmp_path / "model", *vae)
    for name, seed, batch_size in (("one", 0, 1), ("many", 0, 16), ("other", 1, 16)):
        tokenize(tmp_path / "images", tmp_path / name, model, "--seed", seed, "--batch-size", batch_size)
    assert ids(tmp_path / "one") == ids(tmp_path / "many")
    assert ids(tmp_path / "one") != ids(tmp_path / "other")


def test_a_name_in_other_bytes_is_left_out(model, tmp_path, caplog):
    write_images(tmp_path / "in", 4)
    noise_image(0).save(os.fsencode(tmp_path / "in") + b"/\xff.png", format="PNG")
    tokenize(tmp_path / "in", tmp_path / "out", model, "--max-bad-fraction", 0.2)
    assert len(TokenShards(tmp_path / "out")) == 4
    assert "its name is not in UTF-8" in caplog.text


def test_detokenize_gives_what_evaluation_would(images, model, tokens, tmp_path):
    for keep_k in (None, 3):
        out = tmp_path / str(keep_k)
        detokenize(tokens, out, model, "--batch-size", 7, *(() if keep_k is None else ("--keep-k", keep_k)))
        loaded, expected = encoded(model, images)
        with torch.no_grad():
            decoded = decode_tokens(loaded, expected, keep_k=keep_k or 8, seed=0, timesteps=2)
        assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {f"{k}.png" for k in expected.keys}
        for key, image in zip(expected.keys, decoded, strict=True):
            difference = np.asarray(Image.open(out / f"{key}.png")).astype(int) - np.asarray(to_pil(image)).astype(int)
            assert abs(difference).max() <= 1, key


def test_images_may_have_different_numbers_of_tokens(model, tokens, tmp_path):
    folder = tmp_path / "tokens"
    index = json.loads((tokens / "index.json").read_text())
    storage = token_files.storage_of("parquet")
    rows = [row for shard in sorted(tokens.glob("*.parquet")) for row in storage.read(shard)]
    short = [row._replace(ids=row.ids[: 1 + number % 8]) for number, row in enumerate(rows)]
    folder.mkdir()
    for form in FORMATS:
        storage = token_files.storage_of(form)
        storage.write(folder / f"all{storage.suffix}", short, index["settings"])
        read = storage.read(folder / f"all{storage.suffix}")
        assert [(row.key, row.ids.tolist()) for row in read] == [(row.key, row.ids.tolist()) for row in short]
    shard = {"file": "all.parquet", "samples": 30, "skipped": 0, "bytes": (folder / "all.parquet").stat().st_size}
    index["splits"]["tokens"] |= {"shard_size": 30, "shards": [shard | {"sha256": ""}]}
    (folder / "index.json").write_text(json.dumps(index))
    detokenize(folder, tmp_path / "mixed", model, "--keep-k", 5)
    detokenize(tokens, tmp_path / "five", model, "--keep-k", 5)
    same = [
        (tmp_path / f"mixed/{r.key}.png").read_bytes() == (tmp_path / f"five/{r.key}.png").read_bytes() for r in short
    ]
    assert same == [len(row.ids) >= 5 for row in short]


def test_a_target_stores_as_many_tokens_as_it_takes(images, model, tokens, tmp_path, capsys):
    target = 8.5
    options = ("--target", f"psnr={target}", "--steps", 2, "--batch-size", 7)
    tokenize(images, tmp_path / "short", model, *options)
    found, full = ids(tmp_path / "short"), ids(tokens)
    assert all(row == full[key][: len(row)] for key, row in found.items())
    assert len({len(row) for row in found.values()}) > 1
    loaded, expected = encoded(model, images)
    truth = torch.stack([to_tensor(resize_shorter_center_crop(decode(images / key), 8)) for key in expected.keys])
    psnr = {}
    for keep_k in range(1, 9):
        with torch.no_grad():
            decoded = decode_tokens(loaded, expected, keep_k=keep_k, seed=0, timesteps=2)
        psnr[keep_k] = dict(zip(expected.keys, image_metrics(decoded, truth)["psnr"], strict=True))
    for key, row in found.items():
        number = len(row)
        assert psnr[number][key] >= target or number == 8
        assert number == 1 or psnr[number - 1][key] < target
    full_length = sum(len(row) == 8 for row in found.values())
    assert f"tokens per image, {full_length} of the images take all 8" in capsys.readouterr().out
    detokenize(tmp_path / "short", tmp_path / "images", model)
    assert len([*(tmp_path / "images").rglob("*.png")]) == 30
    with pytest.raises(ValueError, match="target"):
        tokenize(images, tmp_path / "short", model, "--target", "psnr=9", "--steps", 2)


def test_a_target_has_a_metric_and_a_number(images, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tokenize(images, tmp_path, model, "--target", "psnr")
    assert "valid are psnr=NUMBER, ssim=NUMBER, lpips=NUMBER" in capsys.readouterr().err


# --- interruptions ----------------------------------------------------------------------------------------------------


@each_format
def test_interruptions_at_random_points_change_nothing(form, images, model, tmp_path, monkeypatch):
    options = ("--format", form, "--shard-size", 4, "--batch-size", 3, "--max-bad-fraction", 0.1)
    source = tmp_path / "images"
    shutil.copytree(images, source)
    spoil(source / "class_1/010.png", "truncated")
    tokenize(source, tmp_path / "whole", model, *options)
    generator, interruptions = random.Random(0), Interruptions(monkeypatch)
    # Before an image is read, before and while a shard is written, and before it or the index is replaced.
    interruptions.may_strike(token_writer, "decode")
    interruptions.may_strike(token_files, "_write_parquet", "_write_tar")
    interruptions.may_strike(shard_folder, "sha256_of", "atomic_path")
    interruptions.may_strike(os, "replace")
    done = 0
    for _ in range(10):
        interruptions.calls_left = generator.randint(0, 12)
        with pytest.raises(Killed):
            tokenize(source, tmp_path / "broken", model, *options)
        index = tmp_path / "broken/index.json"
        now = len(json.loads(index.read_text())["splits"]["tokens"]["shards"]) if index.exists() else 0
        assert now >= done
        done = now
    assert 0 < done < 8
    monkeypatch.undo()
    tokenize(source, tmp_path / "broken", model, *options)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_interrupted_images_are_the_same(model, tokens, tmp_path, monkeypatch):
    detokenize(tokens, tmp_path / "whole", model, "--batch-size", 4)
    generator, interruptions = random.Random(0), Interruptions(monkeypatch)
    interruptions.may_strike(detokenize_command, "_decode")
    interruptions.may_strike(pictures, "atomic_path")
    interruptions.may_strike(os, "replace")
    done = 0
    for _ in range(10):
        interruptions.calls_left = generator.randint(1, 7)
        with pytest.raises(Killed):
            detokenize(tokens, tmp_path / "broken", model, "--batch-size", 4)
        now = len([*(tmp_path / "broken").rglob("*.png")])
        assert now >= done
        done = now
    assert 0 < done < 30
    monkeypatch.undo()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").rglob("*.png")}
    (tmp_path / "broken/class_0/.000.png.png.0123.tmp").write_bytes(b"of a process that was killed")
    detokenize(tokens, tmp_path / "broken", model, "--batch-size", 4)
    assert content(tmp_path / "broken") == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items())


def test_finished_shards_are_left_alone_and_damaged_ones_made_anew(images, model, tokens, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(tokens, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    tokenize(images, out, model)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    shard = out / "tokens-000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    tokenize(images, out, model)
    assert "tokens-000001.parquet is damaged: its checksum is wrong; run `flextok tokenize` again" in caplog.text
    assert content(out) == content(tokens)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def another_model(tmp_path_factory):
    """The same, but for a single weight."""
    from safetensors.torch import load_file

    from flextok.utils.checkpoint import load_metadata, save_safetensors

    folder = export_small_model(tmp_path_factory.mktemp("models") / "another")
    file = folder / "model.safetensors"
    config, weights = load_metadata(file), load_file(file)
    next(iter(weights.values())).view(-1)[0].add_(1)
    save_safetensors(weights, file, config)
    return folder


def test_tokens_of_another_model_are_refused(model, another_model, tokens, tmp_path):
    with pytest.raises(ValueError, match=r"another is not the model that made the tokens in .* --other-model"):
        detokenize(tokens, tmp_path / "out", another_model)
    assert not (tmp_path / "out").exists()
    assert detokenize(tokens, tmp_path / "out", another_model, "--other-model") == 0
    with pytest.raises(ValueError, match="made with model.weights_sha256="):
        detokenize(tokens, tmp_path / "out", model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--keep-k", 4], "keep_k=8, not 4"),
        (["--seed", 1], "seed=0, not 1"),
        (["--format", "webdataset"], "format='parquet', not 'webdataset'"),
        (["--image-size", 4], "image_size=8, not 4"),
        (["--shard-size", 9], "split tokens: shard_size=8, not 9"),
    ],
)
def test_other_settings_are_refused(images, model, tokens, tmp_path, changed, message):
    with pytest.raises(ValueError, match=f"DESTINATION: .* holds tokens made with {message}; valid"):
        tokenize(images, tokens, model, *changed)


def test_another_model_or_other_images_are_refused(images, model, another_model, tokens, tmp_path):
    with pytest.raises(ValueError, match="holds tokens made with model.weights_sha256="):
        tokenize(images, tokens, another_model)
    write_images(tmp_path / "other", 29)
    with pytest.raises(ValueError, match="split tokens: fingerprint"):
        tokenize(tmp_path / "other", tokens, model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--keep-k", 9], "--keep-k is 9: this model has 8 tokens per image"),
        (["--keep-k", 0], "--keep-k is 0: it must be at least 1"),
        (["--image-size", 5], "--image-size is 5: valid are multiples of 4"),
        (["--image-size", 16], "exceed max_sizes"),
        (["--batch-size", 0], "--batch-size is 0"),
        (["--workers", -1], "--workers is -1"),
        (["--max-bad-fraction", 1.5], "--max-bad-fraction is 1.5: it must be between 0 and 1"),
        (["--device", "abacus"], "'abacus': not usable here"),
        (["--checkpoint", "nowhere"], "nowhere: does not exist"),
    ],
)
def test_impossible_options_of_tokenize_are_refused(images, model, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        tokenize(images, tmp_path / "out", model, *changed)


def test_impossible_folders_are_refused(images, model, tmp_path):
    with pytest.raises(ValueError, match="lies in SOURCE"):
        tokenize(images, images / "out", model)
    with pytest.raises(ValueError, match="has no image; valid: a folder of .jpg, "):
        tokenize(tmp_path, tmp_path.parent / "out", model)
    with pytest.raises(ValueError, match="DESTINATION: .* holds no tokens"):
        tokenize(images, model, model)
    with pytest.raises(ValueError, match="is no folder of tokens"):
        detokenize(images, tmp_path / "out", model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--keep-k", 9], "--keep-k is 9: SOURCE holds 8 tokens of each image; valid: 1 to 8"),
        (["--keep-k", 0], "--keep-k is 0"),
        (["--steps", 0], "--steps is 0"),
    ],
)
def test_impossible_options_of_detokenize_are_refused(model, tokens, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        detokenize(tokens, tmp_path / "out", model, *changed)


def test_images_of_other_settings_or_of_something_else_are_not_mixed(model, tokens, tmp_path):
    detokenize(tokens, tmp_path / "out", model)
    with pytest.raises(ValueError, match="DESTINATION: .* holds images made with keep_k=8, not 2; valid"):
        detokenize(tokens, tmp_path / "out", model, "--keep-k", 2)
    (tmp_path / "out/detokenize.json").write_text("{")
    with pytest.raises(ValueError, match="detokenize.json is damaged"):
        detokenize(tokens, tmp_path / "out", model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="was not written by `flextok detokenize`"):
        detokenize(tokens, tmp_path / "mine", model)


@pytest.mark.parametrize("key", ["../out.png", "/tmp/out.png", "a/../../out.png"])
def test_a_key_cannot_leave_the_folder(key, model, tokens, tmp_path):
    shutil.copytree(tokens, tmp_path / "tokens")
    index = json.loads((tmp_path / "tokens/index.json").read_text())
    path = tmp_path / "tokens/tokens-000000.parquet"
    storage = token_files.storage_of("parquet")
    rows = storage.read(path)
    storage.write(path, [rows[0]._replace(key=key), *rows[1:]], index["settings"])
    index["splits"]["tokens"]["shards"][0]["bytes"] = path.stat().st_size
    (tmp_path / "tokens/index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of DESTINATION"):
        detokenize(tmp_path / "tokens", tmp_path / "images/deep", model)
    assert not [path for path in tmp_path.rglob("*.png")]


# --- real processes, many images --------------------------------------------------------------------------------------


def resident_mb():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of the process from /proc")
def test_a_thousand_images_there_and_back_in_flat_memory(tmp_path, monkeypatch):
    """Kept images would show: 800 of them take 100 MB as files are decoded, and 40 MB as the model reads them."""
    model = export_small_model(tmp_path / "model", "data.image_size=64", "size.patch=16")
    (tmp_path / "images").mkdir()
    for number in range(1000):
        noise_image(number, (208, 200)).save(tmp_path / f"images/{number:04d}.jpg", quality=70)
    memory = []
    write_shard, save = shard_folder.ShardFolder.write_shard, detokenize_command._save

    def measured_write(*words, **options):
        write_shard(*words, **options)
        memory.append(resident_mb())

    def measured_save(*words):
        save(*words)
        memory.append(resident_mb())

    monkeypatch.setattr(shard_folder.ShardFolder, "write_shard", measured_write)
    monkeypatch.setattr(detokenize_command, "_save", measured_save)
    tokenize(tmp_path / "images", tmp_path / "tokens", model, "--shard-size", 100, "--batch-size", 20)
    assert len(memory) == 10
    assert memory[9] - memory[1] < 25
    memory.clear()
    detokenize(tmp_path / "tokens", tmp_path / "decoded", model, "--batch-size", 20)
    assert len(memory) == 50
    assert memory[49] - memory[9] < 25
    assert len([*(tmp_path / "decoded").glob("*.png")]) == 1000
    again = ("--shard-size", 64, "--batch-size", 32, "--workers", 2, "--format", "webdataset")
    tokenize(tmp_path / "images", tmp_path / "again", model, *again)
    assert len(ids(tmp_path / "tokens")) == 1000
    assert ids(tmp_path / "tokens") == ids(tmp_path / "again")


@pytest.mark.slow
@each_format
def test_the_command_survives_ten_kills_while_its_workers_read(form, model, tmp_path):
    write_images(tmp_path / "images", 1000)
    options = ("--shard-size", "8", "--batch-size", "4", "--format", form)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "flextok", "tokenize", str(tmp_path / "images"), str(out), *options]
    command += ["--checkpoint", str(model), "--workers", "2"]
    generator = random.Random(0)
    for _ in range(10):
        goal = len([*out.glob("tokens-*")]) + generator.randint(0, 8)
        with subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and (len([*out.glob("tokens-*")]) < goal or not [*out.glob(".*.tmp")]):
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    in_index = json.loads((out / "index.json").read_text())["splits"]["tokens"]["shards"]
    assert 0 < len(in_index) < 125
    tokenize(tmp_path / "images", out, model, *options)
    tokenize(tmp_path / "images", tmp_path / "whole", model, *options)
    assert content(out) == content(tmp_path / "whole")
    assert len(ids(out)) == 1000
