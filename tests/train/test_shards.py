"""Token shards on disk: what is written is what is read, and damage is found."""

import errno
import json
import os
import resource
from hashlib import sha256

import numpy as np
import pytest

from rodimus.errors import InputError
from rodimus.train.shards import ShardWriter, TokenShards, verify

CLOSE = {"bos_token_id": 0, "eos_token_id": 1, "tokenizer_sha256": "t", "source": "test"}


def write(folder, docs, vocab_size=1000, **kwargs):
    writer = ShardWriter(folder, "train", vocab_size, **kwargs)
    for doc in docs:
        writer.add(doc, n_bytes=3 * len(doc))
    writer.close(**CLOSE)
    return folder / "train.json"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "<u2"), (126_464, "<u4")])
def test_documents_come_back(tmp_path, vocab_size, dtype):
    # text of which a tokenizer makes nothing is no document
    docs = [[1, 2, 3], [vocab_size - 1], [], list(range(50))]
    shards = TokenShards(write(tmp_path, docs, vocab_size))
    assert shards.manifest.dtype == dtype
    assert (shards.manifest.n_tokens, shards.manifest.n_docs, shards.manifest.n_bytes) == (
        54,
        3,
        162,
    )
    assert shards.starts[0].tolist() == [0, 3, 4]
    assert shards.read(0, 0, 54).tolist() == sum(docs, [])
    verify(shards.files())
    # a model may have more rows than a tokenizer has tokens
    shards.check_vocabulary(vocab_size + 64)


def test_shards_are_cut_at_documents(tmp_path):
    shards = TokenShards(write(tmp_path, [[7] * 6] * 5, shard_tokens=10))
    assert [s.n_tokens for s in shards.manifest.shards] == [12, 12, 6]
    assert [s.tolist() for s in shards.starts] == [[0, 6], [0, 6], [0]]


def test_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1000\), got 3 to 1000"):
        write(tmp_path, [[3, 1000]])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1000\), got -1 to 3"):
        write(tmp_path, [[3, -1]])


def test_shards_without_a_token_are_an_error(tmp_path):
    with pytest.raises(InputError, match="train.json holds no tokens"):
        TokenShards(write(tmp_path, []))


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx"])
def test_flipped_byte_is_found(tmp_path, name):
    shards = TokenShards(write(tmp_path, [[5] * 20] * 5))
    data = bytearray((tmp_path / name).read_bytes())
    data[33] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} is damaged"):
        verify(shards.files())


def test_bad_id_on_disk_names_file_and_offset(tmp_path):
    path = write(tmp_path, [[5] * 100])
    data = np.fromfile(tmp_path / "train-00000.bin", "<u2")
    data[40] = 1000
    data.tofile(tmp_path / "train-00000.bin")
    with pytest.raises(ValueError, match="train-00000.bin: id 1000 at byte 80"):
        TokenShards(path).read(0, 30, 20)


def test_truncated_or_missing_shard_is_an_error(tmp_path):
    path = write(tmp_path, [[5] * 100])
    (tmp_path / "train-00000.bin").write_bytes(b"\0" * 10)
    with pytest.raises(InputError, match="must have 200 bytes, got 10 bytes"):
        TokenShards(path)
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(InputError, match="got a missing file"):
        TokenShards(path)


def test_more_shards_are_open_than_a_shell_allows_at_first(tmp_path):
    path = write(tmp_path, [[7] * 6] * 40, shard_tokens=6)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        assert len(TokenShards(path).tokens) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path, [[7] * 6])

    def no_more(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(np, "memmap", no_more)
    with pytest.raises(InputError, match="cannot open .*train-00000.bin: Too many open files"):
        TokenShards(path)


def test_a_shard_that_cannot_be_read_is_one_line(tmp_path):
    files = TokenShards(write(tmp_path, [[7] * 6])).files()
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(InputError, match="cannot read .*train-00000.bin: No such file"):
        verify(files)


def test_other_format_version_is_an_error(tmp_path):
    path = write(tmp_path, [[5] * 10])
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(InputError, match="must be shard format 1, got 2"):
        TokenShards(path)
    for text, told in (("[1]", "must be shard format 1, got None"), ("{", "is not a shard mani")):
        path.write_text(text)
        with pytest.raises(InputError, match=told):
            TokenShards(path)
    path.write_text('{"version": 1, "shards": 3}')
    with pytest.raises(InputError, match="is not a whole shard manifest: 'int' object"):
        TokenShards(path)
    path.write_text('{"version": 1}')
    with pytest.raises(InputError, match="is not a whole shard manifest: 'shards'"):
        TokenShards(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "<u1"}, "dtype must be <u2 or <u4, got '<u1'"),
        ({"n_tokens": 29}, "shards have 30 tokens in 3 documents, it says 29 in 3"),
        ({"n_docs": 2}, "shards have 30 tokens in 3 documents, it says 30 in 2"),
        ({"shards": []}, "shards have 0 tokens in 0 documents, it says 30 in 3"),
    ],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_an_error(tmp_path, change, message):
    """It has no checksum, and its counts decide bits/byte and how rows are cut."""
    path = write(tmp_path, [[5] * 10] * 3, shard_tokens=20)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        TokenShards(path)


def test_manifest_records_its_files(tmp_path):
    """Two shards, the second with the document that is left."""
    path = write(tmp_path, [[5] * 10, [6] * 10, [7] * 4], shard_tokens=20)
    manifest = json.loads(path.read_text())
    assert (manifest["n_tokens"], manifest["n_docs"], manifest["n_bytes"]) == (24, 3, 72)
    assert manifest["shards"] == [
        {
            "name": f"train-{i:05d}",
            "n_tokens": tokens,
            "n_docs": docs,
            "bin_sha256": sha256((tmp_path / f"train-{i:05d}.bin").read_bytes()).hexdigest(),
            "idx_sha256": sha256((tmp_path / f"train-{i:05d}.idx").read_bytes()).hexdigest(),
        }
        for i, (tokens, docs) in enumerate([(20, 2), (4, 1)])
    ]
