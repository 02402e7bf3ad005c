"""`flextok prepare`: what comes out is what went in, however often it was killed."""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from PIL import Image

from flextok.cli import image_writer, main, shard_folder
from flextok.data.image_files import list_images, split_files
from flextok.data.tar_shards import key_of, member_name, read_shard
from tests.data_modules.images import noise_image, spoil, write_images
from tests.support import REPOSITORY


def prepare(source, destination, *options):
    return main(
        ["--traceback", "prepare", str(source), str(destination), "--shard-size", "8", "--workers", "0", *options]
    )


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def samples(folder):
    """`{(split, key): (suffix, content)}` of all shards; no key may occur twice."""
    found = {}
    for split, entry in index_of(folder)["splits"].items():
        for shard in entry["shards"]:
            with tarfile.open(folder / shard["file"]) as archive:
                members = archive.getmembers()
                assert len(members) == shard["samples"]
                for member in members:
                    stem, dot, suffix = member.name.rpartition("/")[2].partition(".")
                    key = key_of(member.name.removesuffix(dot + suffix))
                    assert (split, key) not in found
                    found[split, key] = (dot + suffix, archive.extractfile(member).read())
    return found


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images", 40)
    return tmp_path / "images"


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_every_file_is_kept_byte_by_byte_in_its_split(images, tmp_path, capsys):
    assert prepare(images, tmp_path / "out", "--val-fraction", "0.2") == 0
    assert "40 images, 0 unreadable" in capsys.readouterr().out
    keys = list_images(images)
    splits = split_files(keys, val_fraction=0.2, test_fraction=0.05)
    expected = {
        (split, keys[n]): (".png", (images / keys[n]).read_bytes())
        for split, numbers in splits.items()
        for n in numbers
    }
    assert samples(tmp_path / "out") == expected
    sizes = [shard["samples"] for shard in index_of(tmp_path / "out")["splits"]["train"]["shards"]]
    assert set(sizes[:-1]) == {8}


def test_larger_images_shrink_to_the_shorter_side_and_smaller_ones_stay(tmp_path):
    source = tmp_path / "images"
    source.mkdir()
    for name, size in {
        "wide.png": (90, 40),
        "tall.jpg": (33, 50),
        "small.webp": (20, 16),
        "exact.png": (20, 60),
    }.items():
        noise_image(0, size).save(source / name)
    prepare(source, tmp_path / "out", "--image-size", "20", "--quality", "80")
    found = {key: entry for (_, key), entry in samples(tmp_path / "out").items()}
    sizes = {key: (suffix, Image.open(io.BytesIO(content)).size) for key, (suffix, content) in found.items()}
    assert sizes == {
        "wide.png": (".jpg", (45, 20)),
        "tall.jpg": (".jpg", (20, 30)),
        "small.webp": (".webp", (20, 16)),
        "exact.png": (".png", (20, 60)),
    }
    assert found["small.webp"][1] == (source / "small.webp").read_bytes()


@pytest.mark.parametrize("form", ["folder", "pattern"])
def test_tar_files_give_the_same_images(images, tmp_path, form):
    keys = list_images(images)
    (tmp_path / "tars").mkdir()
    for number in range(3):
        members = {key: (images / key).read_bytes() for key in keys[number::3]}
        make_tar(tmp_path / f"tars/{number}.tar", {"notes.txt": b"no image", "._x.png": b"neither", **members})
    prepare(tmp_path / "tars" if form == "folder" else tmp_path / "tars/*.tar", tmp_path / "out")
    found = {key: content for (_, key), (_, content) in samples(tmp_path / "out").items()}
    assert found == {f"{n}.tar/{key}": (images / key).read_bytes() for n in range(3) for key in keys[n::3]}


NAMES = [
    "a.png",
    "a.jpg",
    "a.b.png",
    "a.c.png",
    "x%2Ey.png",
    "__meta__.png",
    "__m__/a.png",
    "é/ü 1.PNG",
    "b" * 120 + ".png",
]


def test_no_two_names_become_one(tmp_path):
    content = io.BytesIO()
    noise_image(0).save(content, format="PNG")
    for number, name in enumerate(NAMES):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content.getvalue() + bytes([number]))
    prepare(tmp_path / "in", tmp_path / "out")
    read = [sample for path in sorted((tmp_path / "out").glob("*.tar")) for sample in read_shard(str(path))]
    assert sorted(key_of(sample.key) for sample in read) == sorted(NAMES)
    assert {sample.image[-1] for sample in read} == set(range(len(NAMES)))
    assert member_name("cats/a.b.png", ".png") == "cats/a%2Eb%2Epng.png"


def test_unreadable_images_are_left_out_and_counted(images, tmp_path, caplog, capsys):
    for number, kind in enumerate(("truncated", "text")):
        spoil(sorted(images.rglob("*.png"))[number * 3], kind)
    prepare(images, tmp_path / "out")
    assert len(samples(tmp_path / "out")) == 38
    assert "38 images, 2 unreadable" in capsys.readouterr().out
    assert sum("leaving out an unreadable image: class_" in message for message in caplog.messages) == 2
    with pytest.raises(ValueError, match=r"1 of the 40 images of SOURCE cannot be read.*--max-bad-fraction=0.0"):
        prepare(images, tmp_path / "strict", "--max-bad-fraction", "0")
    prepare(images, tmp_path / "out", "--max-bad-fraction", "0.05")
    with pytest.raises(ValueError, match=r"2 of the 40 images"):
        prepare(images, tmp_path / "out", "--max-bad-fraction", "0.01")


def test_workers_give_the_same_files(images, tmp_path):
    prepare(images, tmp_path / "one", "--image-size", "8")
    prepare(images, tmp_path / "two", "--image-size", "8", "--workers", "2")
    assert files(tmp_path / "one") == files(tmp_path / "two")


# --- interruptions ----------------------------------------------------------------------------------------------------


def prepare_until(calls, source, destination, *options):
    """Run in a process of its own that kills itself as it begins the given call of one of several functions."""
    left = [calls]

    def deadly(function):
        def call(*args, **named):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **named)

        return call

    # Points in between: before an image is read, before and while a shard is written, and before the index is replaced.
    image_writer.decode = deadly(image_writer.decode)
    image_writer.tarfile.TarFile.addfile = deadly(tarfile.TarFile.addfile)
    shard_folder.sha256_of = deadly(shard_folder.sha256_of)
    os.replace = deadly(os.replace)
    prepare(source, destination, *options)


def test_ten_kills_at_random_points_change_nothing(tmp_path):
    images = tmp_path / "images"
    spoil(write_images(images, 120)[0], "text")
    prepare(images, tmp_path / "whole", "--image-size", "9")
    generator = random.Random(0)
    context = multiprocessing.get_context("fork")  # Starts at once: everything is imported.
    out = tmp_path / "killed"
    done = 0
    for _ in range(10):
        calls = generator.randint(0, 40)
        process = context.Process(target=prepare_until, args=(calls, images, out, "--image-size", "9"))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL
        if (out / "index.json").exists():
            shards = [shard for split in index_of(out)["splits"].values() for shard in split["shards"]]
            assert len(shards) >= done
            done = len(shards)
    assert 0 < done < 15
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    prepare(images, out, "--image-size", "9")
    assert sum((out / name).stat().st_mtime_ns != time_ns for name, time_ns in kept.items()) <= 1
    assert samples(out) == samples(tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_survives_ten_kills_while_its_workers_read(tmp_path):
    write_images(tmp_path / "images", 400)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "flextok", "prepare", str(tmp_path / "images"), str(out)]
    command += ["--shard-size", "8", "--workers", "2", "--image-size", "9"]
    generator = random.Random(0)
    for _ in range(10):
        before = len(list(out.glob("*.tar")))
        goal = before + generator.randint(0, 4)
        with subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        ) as process:
            while process.poll() is None and (len(list(out.glob("*.tar"))) < goal or not list(out.glob(".*.tmp"))):
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    prepare(tmp_path / "images", out, "--image-size", "9")
    prepare(tmp_path / "images", tmp_path / "whole", "--image-size", "9")
    assert samples(out) == samples(tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_finished_shards_are_left_alone_and_damaged_ones_made_anew(images, tmp_path, caplog):
    out = tmp_path / "out"
    prepare(images, out)
    before, times = files(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare(images, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    content = before["train-000001.tar"]
    (out / "train-000001.tar").write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    prepare(images, out)
    assert "train-000001.tar is damaged: its checksum is wrong" in caplog.text
    assert files(out) == before


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--image-size", "8"], "image_size=None, not 8"),
        (["--val-fraction", "0.1"], "val_fraction=0.05, not 0.1"),
        (["--shard-size", "9"], "split train: shard_size=8, not 9"),
    ],
)
def test_other_settings_are_refused(images, tmp_path, changed, message):
    prepare(images, tmp_path / "out")
    with pytest.raises(ValueError, match=f"DESTINATION: .* holds image shards made with {message}; valid"):
        prepare(images, tmp_path / "out", *changed)


def test_other_images_are_refused(images, tmp_path):
    prepare(images, tmp_path / "out")
    write_images(images / "more", 5)
    with pytest.raises(ValueError, match="split train: "):
        prepare(images, tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--image-size", "0"], "--image-size is 0: it must be at least 1"),
        (["--quality", "101"], "--quality is 101: it must be between 1 and 100"),
        (["--workers", "-1"], "--workers is -1"),
        (["--max-bad-fraction", "2"], "--max-bad-fraction is 2.0: it must be between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(images, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        prepare(images, tmp_path / "out", *option)
    assert not (tmp_path / "out").exists()


def test_a_source_without_images_is_refused(images, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "*.tar"):
        with pytest.raises(ValueError, match="has no image; valid: a folder of .jpg, "):
            prepare(source, tmp_path / "out")
    make_tar(tmp_path / "empty/a.tar", {"notes.txt": b"x"})
    with pytest.raises(ValueError, match="no image in 1 tar files"):
        prepare(tmp_path / "empty", tmp_path / "out")
    make_tar(images / "a.tar", {"a.png": b"x"})
    with pytest.raises(ValueError, match="holds images and tar files"):
        prepare(images, tmp_path / "out")
    with pytest.raises(ValueError, match="lies in SOURCE"):
        prepare(images, images / "out")


@pytest.mark.parametrize("kind", ["cut off", "cut between", "damaged header"])
def test_a_damaged_tar_file_is_named(images, tmp_path, kind):
    members = {key: (images / key).read_bytes() for key in list_images(images)}
    make_tar(tmp_path / "a.tar", members)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    second = 512 + -(-len(members["class_0/000.png"]) // 512) * 512
    if kind == "damaged header":
        content[second + 10] ^= 1
    (tmp_path / "a.tar").write_bytes(content[: {"cut off": second + 700, "cut between": second}.get(kind)])
    with pytest.raises(ValueError, match="a.tar is no complete, uncompressed tar file"):
        prepare(tmp_path / "*.tar", tmp_path / "out")
