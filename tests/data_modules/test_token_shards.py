"""Tokens as a data set: by number, in order, from worker processes; damage is named."""

import builtins
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flextok.data import token_shards
from flextok.data.token_files import TokenRow, storage_of
from flextok.data.token_shards import TokenShards

SETTINGS = {"model": {"weights_sha256": "abc"}, "keep_k": 4, "seed": 0}


def rows(count, *, start=0, length=4):
    return [
        TokenRow(f"dir/ä {n}.a.png", np.arange(n, n + length, dtype=np.int32), 10 + n, 20 + n)
        for n in range(start, start + count)
    ]


def write(folder, form="parquet", sizes=(5, 5, 0, 3)):
    """Shards of these sizes; the third has lost all its images."""
    folder.mkdir(exist_ok=True)
    storage, shards = storage_of(form), []
    for number, size in enumerate(sizes):
        path = folder / f"tokens-{number:06d}{storage.suffix}"
        storage.write(path, rows(size, start=sum(sizes[:number])), SETTINGS)
        content = path.read_bytes()
        sums = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        shards.append({"file": path.name, "samples": size, "skipped": 5 - size, **sums})
    split = {"samples": 20, "shard_size": 5, "fingerprint": "", "shards": shards}
    index = {"format": "flextok tokens 1", "settings": SETTINGS | {"format": form}, "splits": {"tokens": split}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_samples_come_back_by_number(form, tmp_path):
    tokens = TokenShards(write(tmp_path, form), shards_in_memory=1)
    assert len(tokens) == 13
    for number in (12, 0, 4, 5, 9, 10, -1):
        expected = rows(13)[number]
        sample = tokens[number]
        assert sample["ids"].dtype == torch.int64
        assert sample["ids"].tolist() == expected.ids.tolist()
        assert (sample["key"], sample["height"], sample["width"]) == (expected.key, expected.height, expected.width)
    assert [*tokens.keys()] == [row.key for row in rows(13)]
    for number in (13, -14):
        with pytest.raises(IndexError):
            tokens[number]


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
@pytest.mark.parametrize("lengths", [(), (1,), (0, 3, 1), (256,) * 3])
def test_ids_survive_in_both_formats_whatever_their_number(form, lengths, tmp_path):
    largest = np.iinfo(np.int32).max
    written = [
        TokenRow(f"{n}.png", np.full(length, largest - n, dtype=np.int32), 1, 1) for n, length in enumerate(lengths)
    ]
    storage = storage_of(form)
    storage.write(tmp_path / "file", written, SETTINGS)
    read = storage.read(tmp_path / "file")
    assert [(row.key, row.ids.tolist()) for row in read] == [(row.key, row.ids.tolist()) for row in written]
    assert all(row.ids.dtype == np.int32 for row in read)
    storage.write(tmp_path / "again", written, SETTINGS)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_loaders_read_it(tmp_path):
    loader = DataLoader(TokenShards(write(tmp_path)), batch_size=4, num_workers=2)
    batches = [*loader]
    assert torch.cat([batch["ids"] for batch in batches]).tolist() == [row.ids.tolist() for row in rows(13)]
    assert [key for batch in batches for key in batch["key"]] == [row.key for row in rows(13)]


def test_only_the_last_shards_are_kept(tmp_path, monkeypatch):
    write(tmp_path)
    read = []

    def counted(name):
        storage = storage_of(name)
        return storage._replace(read=lambda path: read.append(path.name) or storage.read(path))

    monkeypatch.setattr(token_shards, "storage_of", counted)
    tokens = TokenShards(tmp_path, shards_in_memory=2)
    for number in (0, 1, 5, 0, 12, 0, 5):
        tokens[number]
    assert [name[7:13] for name in read] == ["000000", "000001", "000003", "000001"]
    assert len(tokens._read) == 2
    monkeypatch.undo()
    assert len(pickle.loads(pickle.dumps(TokenShards(tmp_path)))._read) == 0


def test_damage_is_named(tmp_path):
    write(tmp_path)
    path = tmp_path / "tokens-000001.parquet"
    content = path.read_bytes()
    path.write_bytes(b"?" * len(content))
    tokens = TokenShards(tmp_path)
    tokens[0]
    with pytest.raises(ValueError, match=r"tokens-000001.parquet is damaged: .*run `flextok tokenize` again"):
        tokens[5]
    path.write_bytes((tmp_path / "tokens-000003.parquet").read_bytes().ljust(len(content)))
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"tokens-000001.parquet is damaged: \d+ bytes, written were"):
        TokenShards(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"tokens-000001.parquet is damaged: the file is missing"):
        TokenShards(tmp_path)


@pytest.mark.parametrize("how", ["cut off", "header"])
def test_damaged_tar_files_are_named(how, tmp_path):
    write(tmp_path, "webdataset")
    path = tmp_path / "tokens-000000.tar"
    content = bytearray(path.read_bytes())
    if how == "cut off":
        content[1500:] = bytes(len(content) - 1500)
    else:
        content[1024:1100] = b"\xff" * 76
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens-000000.tar is damaged: "):
        TokenShards(tmp_path)[0]


def test_folders_that_are_not_whole_are_refused(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["splits"]["tokens"]["shards"].pop()
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"^folder='.*': split tokens has 3 of 4 shards; run `flextok tokenize` again"):
        TokenShards(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"splits": {}}))
    with pytest.raises(ValueError, match="split tokens has 0 of 1 shards"):
        TokenShards(tmp_path)
    with pytest.raises(ValueError, match="folder='.*nowhere' is no folder of tokens"):
        TokenShards(tmp_path / "nowhere")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "parquet")
    write(tmp_path / "tar", "webdataset")
    original = builtins.__import__

    def without_pyarrow(name, *rest):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert len(TokenShards(tmp_path / "tar")) == 13
    with pytest.raises(ImportError, match=r"pip install 'flextok\[tokens\]'.*webdataset"):
        TokenShards(tmp_path / "parquet")
