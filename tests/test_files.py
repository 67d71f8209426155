"""Files that are written whole or not at all."""

import os

import pytest

from rodimus.files import write_atomic


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, done, replace = tmp_path / "latest", [], os.replace

    def replaced(unfinished, target):
        done.append((unfinished.read_bytes(), target.name))
        replace(unfinished, target)

    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size))
    monkeypatch.setattr(os, "replace", replaced)
    write_atomic(path, "step-3\N{LATIN SMALL LETTER E WITH ACUTE}")
    assert done == [8, (b"step-3\xc3\xa9", "latest")]
    assert path.read_bytes() == b"step-3\xc3\xa9" and os.listdir(tmp_path) == ["latest"]


def test_a_file_is_replaced_and_never_written_into(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "open elsewhere")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "open elsewhere").read_bytes() == b"old"


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, problem):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fails(descriptor):
        raise problem

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(type(problem)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_one_file_may_be_written_twice_at_once(tmp_path, monkeypatch):
    path, sync = tmp_path / "file", os.fsync

    def and_again(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        write_atomic(path, b"the shorter")
        assert path.read_bytes() == b"the shorter"

    monkeypatch.setattr(os, "fsync", and_again)
    write_atomic(path, b"the longer of the two")
    assert path.read_bytes() == b"the longer of the two" and os.listdir(tmp_path) == ["file"]
