"""`rodimus data pack`: split, deduplication, tokenizer, bad input."""

import errno
import importlib
import json
import os
import resource
import sys
import types
from contextlib import suppress
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rodimus import cli
from rodimus.errors import InputError
from rodimus.loading import read_tokenizer
from rodimus.train import pack as pack_module
from rodimus.train.pack import pack, split_documents
from rodimus.train.shards import TokenShards, verify
from rodimus.train.sources import documents
from rodimus.train.tokenizer import DocumentEncoder, train_tokenizer

TEXTS = [f"def function_{i}(x):\n    return x + {i * i}  # é{i}\n" for i in range(60)]


def command(words: list[str]) -> int:
    """The exit code of ``rodimus data pack`` with these words."""
    return cli.main(["data", "pack", *words])


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*TEXTS, *TEXTS[:7], " \n"]))
    return path


def decode(folder, part):
    shards = TokenShards(folder / f"{part}.json")
    tokenizer = read_tokenizer(folder / "tokenizer")
    ends = [*shards.starts[0][1:].tolist(), shards.manifest.n_tokens]
    return [
        tokenizer.decode(shards.read(0, a, b - a), skip_special_tokens=True)
        for a, b in zip(shards.starts[0].tolist(), ends, strict=True)
    ]


def test_every_text_lands_once_in_one_part(corpus, tmp_path, monkeypatch):
    # which some texts fill
    monkeypatch.setattr(pack_module, "_BATCH_BYTES", 100)
    manifests = pack(str(corpus), tmp_path / "out", vocab_size=300, val_fraction=0.2)
    train, val = decode(tmp_path / "out", "train"), decode(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert 0 < len(val) < 30
    assert sum(m.n_bytes for m in manifests.values()) == sum(len(t.encode()) for t in TEXTS)


def test_a_part_of_a_corpus_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    """As one without permission, which root has everywhere."""
    closed = tmp_path / "closed"
    closed.mkdir()
    (tmp_path / "open.txt").write_text("text")

    def scandir(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(closed))
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=f"cannot read {closed}: Permission denied"):
        list(documents(str(tmp_path)))


def test_part_depends_on_the_text_alone(corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": t}) + "\n" for t in reversed(TEXTS)))
    parts = [{t: p for p, t, _ in split_documents(str(path), 0.2)} for path in (corpus, other)]
    assert parts[0] == parts[1]


def test_tokenizer_never_sees_held_out_text(corpus, tmp_path, monkeypatch):
    seen = []

    def spy(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(pack_module, "train_tokenizer", spy)
    pack(str(corpus), tmp_path / "out", vocab_size=300, tokenizer_sample=1.0, val_fraction=0.2)
    val = {t for p, t, _ in split_documents(str(corpus), 0.2) if p == "val"}
    assert val
    assert set(seen) == set(TEXTS) - val
    # half of what is trained on, whichever half of all that is
    seen.clear()
    pack_module.learn(str(corpus), 300, 0.5, 0.5, "text")
    train = {t for p, t, _ in split_documents(str(corpus), 0.5) if p == "train"}
    assert set(seen) < train and 0.25 < len(seen) / len(train) < 0.75


def test_documents_carry_marks_and_spelled_marks_stay_text(corpus, tmp_path):
    pack(str(corpus), tmp_path / "out", vocab_size=300)
    tokenizer = read_tokenizer(tmp_path / "out" / "tokenizer")
    ids = DocumentEncoder(tokenizer)(["a <|end|> b"])[0]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in ids[:-1]
    assert read_tokenizer(tmp_path / "out" / "tokenizer")("x").input_ids[0] == 0


def test_a_trained_tokenizer_pads_on_the_left(corpus, tmp_path):
    pack(str(corpus), tmp_path / "out", vocab_size=300)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    long, short = tokenizer(["return x + 12345", "d"], padding=True).input_ids
    alone = tokenizer("d").input_ids
    assert short == [tokenizer.eos_token_id] * (len(long) - len(alone)) + alone != alone


def test_a_tokenizer_that_truncates_and_pads_does_neither_to_documents():
    """A folder says both, once it was saved after `tokenizer(texts, truncation=True)`."""
    tokenizer = train_tokenizer(TEXTS, 300)
    whole = DocumentEncoder(tokenizer)(TEXTS[:2] + ["x"])
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    assert max(map(len, whole)) > 18
    assert DocumentEncoder(tokenizer)(TEXTS[:2] + ["x"]) == whole


def test_a_tokenizer_alone_is_that_of_a_pack(corpus, tmp_path, capsys):
    """Of the same text, with the same options; nothing is written over."""
    options = ["--vocab-size", "300", "--val-fraction", "0.2", "--tokenizer-sample", "0.5"]
    for command, out in [("data pack", "packed"), ("tokenizer train", "alone")]:
        assert cli.main([*command.split(), str(corpus), str(tmp_path / out), *options]) == 0
    names = ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        packed = tmp_path / "packed" / "tokenizer" / name
        assert (tmp_path / "alone" / name).read_bytes() == packed.read_bytes()
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == names
    assert cli.main(["tokenizer", "train", str(corpus), str(tmp_path / "alone")]) == 2
    assert cli.main(["tokenizer", "train", "none.jsonl", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    wrong = ["--tokenizer-sample", "1.5"]
    assert cli.main(["tokenizer", "train", str(corpus), str(tmp_path / "new"), *wrong]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "alone is not empty" in errors[0]


def test_a_tokenizer_of_no_text_is_not_written(tmp_path, capsys):
    """It would be one of bytes alone, in place of the one that was meant."""
    (tmp_path / "blank.txt").write_text(" \n")
    assert cli.main(["tokenizer", "train", str(tmp_path / "blank.txt"), str(tmp_path / "new")]) == 2
    assert "blank.txt is empty: no text was found for it" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_is_written_whole_or_not_at_all(corpus, tmp_path, monkeypatch, capsys):
    save = PreTrainedTokenizerFast.save_pretrained

    def full(self, folder, *arguments):
        save(self, folder, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    words = ["tokenizer", "train", str(corpus), str(tmp_path / "alone"), "--vocab-size", "300"]
    assert cli.main(words) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "alone").exists()


def test_given_tokenizer_is_used_and_copied(corpus, tmp_path):
    first = pack(str(corpus), tmp_path / "a", vocab_size=300)
    second = pack(str(corpus), tmp_path / "b", tokenizer=str(tmp_path / "a" / "tokenizer"))
    assert first["train"].tokenizer_sha256 == second["train"].tokenizer_sha256
    assert first["train"].shards == second["train"].shards


def test_every_chat_template_of_a_tokenizer_is_kept(corpus, tmp_path):
    """All but the first are files in a folder of their own."""
    given = train_tokenizer(TEXTS, 300)
    given.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    given.save_pretrained(tmp_path / "given")
    pack(str(corpus), tmp_path / "out", tokenizer=str(tmp_path / "given"))
    assert read_tokenizer(tmp_path / "out" / "tokenizer").chat_template == given.chat_template


def test_a_tokenizer_is_named_as_a_model_is(corpus, tmp_path, monkeypatch):
    """A run, or the hub: what is asked for there are no weights."""
    asked = []

    def download(name, allow_patterns, **options):
        asked.append((name, allow_patterns))
        return str(tmp_path / "run" / "tokenizer")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    first = pack(str(corpus), tmp_path / "run", vocab_size=300)
    (tmp_path / "run" / "model.json").write_text("{}")
    for i, name in enumerate((tmp_path / "run", "owner/name")):
        second = pack(str(corpus), tmp_path / f"out{i}", tokenizer=str(name))
        assert first["train"].tokenizer_sha256 == second["train"].tokenizer_sha256
    assert asked == [("owner/name", ["*.json", "*.jinja"])]
    with pytest.raises(InputError, match=r"corpus.jsonl holds no tokenizer: expected tokenizer.j"):
        pack(str(corpus), tmp_path / "out", tokenizer=str(corpus))
    # another pack has one within
    with pytest.raises(InputError, match=r"out0 holds no .*; did you mean .*out0.tokenizer\?"):
        pack(str(corpus), tmp_path / "out", tokenizer=str(tmp_path / "out0"))


def test_folder_and_plain_text(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "b.txt").write_text("two")
    (tmp_path / "src" / "a.jsonl").write_text('{"body": "one"}\n\n')
    assert list(documents(str(tmp_path / "src"), field="body")) == ["one", "two"]


def test_a_folder_leaves_no_text_out_in_silence(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "photo.png").write_bytes(b"\xff")
    assert list(documents(str(tmp_path))) == list(documents(str(tmp_path / "A.TXT"))) == ["one"]
    for name, message in (("b.jsonl.gz", "is compressed: expected b.jsonl"), ("c.md", "leads to")):
        (tmp_path / name).symlink_to("nowhere")
        with pytest.raises(InputError, match=f"{name} {message}"):
            list(documents(str(tmp_path)))
        (tmp_path / name).unlink()


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "two"}\r\n{"text": "three"}\r\n')
    assert list(documents(str(tmp_path))) == ["one", "two", "three"]


def test_stdlib_is_python_source_without_tests():
    texts = list(documents("stdlib"))
    assert len(texts) > 300
    assert any("class JSONDecoder" in t for t in texts)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a.txt must be UTF-8, got byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"line 2 must be UTF-8, .* offset 24"),
        ("a.jsonl", b'{"text": "a"', r"a.jsonl line 1 is not JSON"),
        ("a.jsonl", b"[" * 200_000, r"a.jsonl line 1 is not JSON"),
        ("a.jsonl", b'{"body": "a"}', r"line 1 must have a string field 'text', got body"),
        ("a.jsonl", b'{"text": 5}', r"line 1 must have a string field 'text', got 5 there"),
        (
            "a.jsonl",
            b'{"text": "a \\ud800"}',
            r"line 1, field 'text', is no Unicode .* U\+D800, at 2",
        ),
        ("a.txt", b" \n", r"the train part of .*a.txt is empty"),
        ("a.pdf", b"x", r"source must end in .txt"),
    ],
)
def test_bad_corpus_is_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        pack(str(tmp_path / name), tmp_path / "out", vocab_size=300, val_fraction=0.0)
    assert not (tmp_path / "out").exists()


def write_parquet(path, column, kind=None, name="text", **options):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.table({name: pyarrow.array(column, kind and getattr(pyarrow, kind)())})
    importlib.import_module("pyarrow.parquet").write_table(table, path, **options)
    return path


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet_is_one_document_a_row(tmp_path, kind):
    path = write_parquet(tmp_path / "a.parquet", ["one", None, "", "two"], kind)
    assert list(documents(str(path))) == ["one", "two"]
    other = write_parquet(tmp_path / "b.parquet", ["three"], name="a.b")
    assert list(documents(str(other), field="a.b")) == ["three"]
    assert not list(documents(str(write_parquet(tmp_path / "c.parquet", [None]))))


def test_odd_texts_are_packed_to_the_byte(tmp_path):
    """Line ends, blank lines, a byte order mark and what else Unicode breaks lines at; row groups
    and nulls; a word longer than a batch."""
    texts = ["one\r\ntwo\n", "a\x00b", "\ufeffx", "é e\u0301 👨\u200d👩", "\u2028b\x85\x0c"]
    texts.append("<|end|>" + "y" * (1 << 20) + "\r\n")
    lines = [json.dumps({"text": t}, ensure_ascii=i % 2).encode() for i, t in enumerate(texts)]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(b"\xef\xbb\xbf\r\n" + b"\r\n \t\n\n".join(lines))
    column = [x for text in texts for x in (text, None)]
    parquet = write_parquet(tmp_path / "a.parquet", column, "string", row_group_size=3)
    for source in (jsonl, parquet):
        out = tmp_path / source.suffix
        manifest = pack(str(source), out, vocab_size=300, val_fraction=0.0)["train"]
        assert sorted(decode(out, "train")) == sorted(texts)
        assert manifest.n_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("column", [[1], [b"a"], [["a"]], [{"a": "b"}]], ids=str)
def test_a_column_that_is_no_text_is_named(tmp_path, column):
    path = write_parquet(tmp_path / "a.parquet", column)
    with pytest.raises(InputError, match=r"a.parquet, column 'text', must be text, got "):
        list(documents(str(path)))
    with pytest.raises(InputError, match="must have a column 'body', got text"):
        list(documents(str(path), field="body"))


def test_two_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="must have a column 'text', got text, text"):
        list(documents(str(tmp_path / "a.parquet")))


def test_damaged_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    whole = path.read_bytes()
    damaged = [bytearray(whole) for _ in range(2)]
    for data, part in zip(damaged, (slice(100, 300), slice(4, 40)), strict=True):
        data[part] = bytes(x ^ 0x5A for x in data[part])
    for data in (b"", b"no parquet file" * 9, whole[: len(whole) // 2], *damaged):
        path.write_bytes(data)
        with pytest.raises(InputError, match="a.parquet is damaged or no parquet file: ") as error:
            list(documents(str(path)))
        assert "\n" not in str(error.value)


def test_parquet_that_is_not_utf8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    ends, data = (pyarrow.py_buffer(x) for x in (b"\0\0\0\0\1\0\0\0\2\0\0\0", b"a\xff"))
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, ends, data])
    path = write_parquet(tmp_path / "a.parquet", column)
    with pytest.raises(InputError, match="a.parquet row 2, column 'text', must be UTF-8"):
        list(documents(str(path)))


class FakeDatasets(types.ModuleType):
    """Of the package: one dataset, or an error."""

    class exceptions:
        DatasetsError = type("DatasetsError", (Exception,), {})

    def __init__(self, rows, error=None):
        super().__init__("datasets")
        self.rows, self.error = rows, error

    def load_dataset(self, name, split, streaming):
        if self.error is not None:
            raise self.error
        return iter(self.rows)


def test_rows_of_a_dataset(monkeypatch):
    def read(name="x", **given):
        monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(**given))
        return list(documents(f"hf:{name}"))

    assert read(rows=[{"text": "a"}, {"text": None}, {"text": ""}]) == ["a"]
    for rows, message in (
        ([{"text": "a"}, {"text": 5}], "row 2, field 'text', must be text, got 5"),
        ([{"body": "a"}], "must have a field 'text', got body"),
    ):
        with pytest.raises(InputError, match=message):
            read(rows=rows)
    for error in (
        ValueError("Bad split: train\nand more"),
        FileNotFoundError("none"),
        FakeDatasets.exceptions.DatasetsError("damaged"),
    ):
        with pytest.raises(InputError, match=r"^hf:x cannot be read: [^\n]*$"):
            read(rows=[], error=error)
    with pytest.raises(InputError, match="must be followed by"):
        read(name="", rows=[])


def test_a_dataset_that_was_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "x"))
    assert list(documents(f"hf:{tmp_path / 'x'}")) == ["one", "two"]


def test_one_document_cannot_be_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    with pytest.raises(InputError, match=r"val part of .*a.txt .* 1 document.*--val-fraction 0"):
        pack(str(tmp_path / "a.txt"), tmp_path / "out", vocab_size=300)


@pytest.mark.parametrize("text", TEXTS[:5])
def test_a_tokenizer_is_trained_on_what_little_there_is(tmp_path, text):
    """A fifth of one document is none of it, as a rule."""
    (tmp_path / "a.txt").write_text(text * 20)
    pack(str(tmp_path / "a.txt"), tmp_path / "out", vocab_size=280, val_fraction=0.0)
    assert len(read_tokenizer(tmp_path / "out" / "tokenizer")) > 258


def test_command_reports_and_fails_in_one_line(corpus, tmp_path, capsys):
    assert command([str(corpus), str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    assert "bytes/token" in capsys.readouterr().out
    for source, out, *options in [
        (tmp_path / "none", tmp_path / "new"),
        (corpus, "/dev/null/out"),
        (corpus, tmp_path / "new", "--val-fraction", "1.5"),
        (corpus, tmp_path / "new", "--shard-tokens", "0"),
        (corpus, tmp_path / "new", "--tokenizer-sample", "-0.5"),
        ("x" * 300, tmp_path / "new"),
        ("", tmp_path / "new"),
    ]:
        assert command([str(source), str(out), *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["train.json", "tokenizer/tokenizer.json", "notes.md"])
def test_a_folder_that_holds_something_is_kept_unless_told(corpus, tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    words = [str(corpus), str(out), "--vocab-size", "300"]
    assert command(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert [path.read_text() for path in out.rglob("*") if path.is_file()] == ["mine"]
    assert command([*words, "--overwrite"]) == 0


def test_a_pack_that_fails_leaves_the_earlier_one_whole(corpus, tmp_path):
    out = tmp_path / "out"
    pack(str(corpus), out, vocab_size=300)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(InputError, match="the val part of .* is empty"):
        pack(str(tmp_path / "one.txt"), out, vocab_size=300, overwrite=True)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "one.txt", "out"]


def test_a_pack_replaces_the_earlier_one_and_nothing_else(corpus, tmp_path):
    out = tmp_path / "out"
    pack(str(corpus), out, vocab_size=300, shard_tokens=200)
    (out / "notes.md").write_text("mine")
    many = len(list(out.glob("train-*.bin")))
    (tmp_path / "one.txt").write_text("one document")
    pack(str(tmp_path / "one.txt"), out, vocab_size=300, val_fraction=0.0, overwrite=True)
    assert many > 1 and decode(out, "train") == ["one document"]
    names = ["notes.md", "tokenizer", "train-00000.bin", "train-00000.idx", "train.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_ids_may_have_gaps(corpus, tmp_path):
    """Then a model needs rows for the largest id, not for as many as there are tokens."""
    train_tokenizer(TEXTS, 300).save_pretrained(tmp_path / "gap")
    path = tmp_path / "gap" / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"] |= {"e": 70_000}
    path.write_text(json.dumps(described))
    manifest = pack(str(corpus), tmp_path / "out", tokenizer=str(tmp_path / "gap"))["train"]
    assert (manifest.vocab_size, manifest.dtype) == (70_001, "<u4")
    train, val = decode(tmp_path / "out", "train"), decode(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(TEXTS)


def test_a_replaced_pack_leaves_nothing_in_the_tokenizer(corpus, tmp_path):
    """A chat template would be read as that of the new one."""
    first = train_tokenizer(TEXTS, 300)
    first.chat_template = "{{ messages }}"
    first.save_pretrained(tmp_path / "chat")
    pack(str(corpus), tmp_path / "out", tokenizer=str(tmp_path / "chat"))
    assert read_tokenizer(tmp_path / "out" / "tokenizer").chat_template
    pack(str(corpus), tmp_path / "out", vocab_size=300, overwrite=True)
    assert not read_tokenizer(tmp_path / "out" / "tokenizer").chat_template


def test_a_disk_that_is_full_is_one_line(corpus, tmp_path, capsys):
    """Also where the tokenizer's own writer finds it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        assert command([str(corpus), str(tmp_path / "out"), "--vocab-size", "300"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "error: the tokenizer cannot be written: File too large" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_on_another_file_system_is_packed_into(corpus, tmp_path, monkeypatch):
    """A mount point, or a link: nothing can be renamed into it from beside it."""
    out, rename = tmp_path / "out", os.replace

    def replace(source, target):
        if source.is_relative_to(out) != target.is_relative_to(out):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for _ in range(2):
        pack(str(corpus), out, vocab_size=300, overwrite=True)
        assert sorted(decode(out, "train") + decode(out, "val")) == sorted(TEXTS)
    names = ["tokenizer", "train-00000.bin", "train-00000.idx", "train.json"]
    names += ["val-00000.bin", "val-00000.idx", "val.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_what_a_killed_pack_left_goes_with_the_next(corpus, tmp_path):
    out = tmp_path / "out"
    (out / ".pack-killed").mkdir(parents=True)
    (out / ".pack-killed" / "train-00000.bin").write_bytes(bytes(100))
    with pytest.raises(InputError, match="out holds a pack that was killed or is at work"):
        pack(str(corpus), out, vocab_size=300)
    pack(str(corpus), out, vocab_size=300, overwrite=True)
    assert not list(out.glob(".*"))


def test_a_pack_that_was_killed_while_it_replaced_one_leaves_no_shards(
    corpus, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    pack(str(corpus), out, vocab_size=300, shard_tokens=200)
    (out / "train-notes.bin").write_text("mine")
    replace = os.replace

    def killed(source, target):
        if source.name == "train.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rodimus.train.pack.os.replace", killed)
        pack(str(corpus), out, vocab_size=300, shard_tokens=200, overwrite=True)
    (tmp_path / "one.txt").write_text("one document")
    pack(str(tmp_path / "one.txt"), out, vocab_size=300, val_fraction=0.0, overwrite=True)
    names = {"tokenizer", "train-00000.bin", "train-00000.idx", "train-notes.bin", "train.json"}
    assert {path.name for path in out.iterdir()} == names


def test_a_pack_that_was_killed_while_it_replaced_one_leaves_nothing_in_the_tokenizer(
    corpus, tmp_path, monkeypatch
):
    """Wherever it was: what has no manifest is a pack's if there are shards."""
    chatty, out = train_tokenizer(TEXTS, 300), tmp_path / "out"
    chatty.chat_template = "{{ messages }}"
    chatty.save_pretrained(tmp_path / "chat")
    replace, left = os.replace, []

    def killed(source, target):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        replace(source, target)

    def interrupted(after):
        """Whether a pack was, after it had moved so many files."""
        left[:] = range(after)
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr("rodimus.train.pack.os.replace", killed)
            pack(str(corpus), out, tokenizer=str(tmp_path / "chat"), overwrite=True)
            return False
        return True

    after = 0
    while interrupted(after):
        pack(str(corpus), out, vocab_size=300, overwrite=True)
        assert not read_tokenizer(out / "tokenizer").chat_template, after
        after += 1
    assert after > 6


def test_of_two_packs_that_overwrite_one_folder_the_second_is_refused(
    corpus, tmp_path, monkeypatch
):
    """Before it has removed what the first has made so far."""
    refused, write_parts = [], pack_module._write_parts

    def first(*arguments, **options):
        manifests = write_parts(*arguments, **options)
        if not refused:
            refused.append(True)
            with pytest.raises(InputError, match="out: wait for its end"):
                pack(str(corpus), tmp_path / "out", vocab_size=300, overwrite=True)
        return manifests

    monkeypatch.setattr(pack_module, "_write_parts", first)
    for _ in range(2):
        refused.clear()
        pack(str(corpus), tmp_path / "out", vocab_size=300, overwrite=True)
    assert refused and verify(TokenShards(tmp_path / "out" / "train.json").files()) is None


def test_a_folder_that_cannot_be_locked_is_packed_into(corpus, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert pack(str(corpus), tmp_path / "out", vocab_size=300)["train"].n_docs


def test_a_second_pack_into_a_folder_is_refused(corpus, tmp_path, monkeypatch):
    """While the first is at work, before any of it is there."""
    refused = []

    def second(texts, vocab_size):
        with pytest.raises(InputError, match="was killed or is at work"):
            pack(str(corpus), tmp_path / "out", vocab_size=300)
        refused.append(True)
        return train_tokenizer(texts, vocab_size)

    monkeypatch.setattr(pack_module, "train_tokenizer", second)
    pack(str(corpus), tmp_path / "out", vocab_size=300)
    assert refused
