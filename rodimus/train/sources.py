"""Where text comes from: an iterator of documents for each kind of source.

``stdlib`` is the Python standard library's own sources, so that a first run needs no download.
"""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError, first_line

# licence of what `stdlib` reads, recorded in the manifest
STDLIB_LICENCE = "PSF-2.0"
_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# installed packages, and test suites whose data tables would crowd out ordinary code
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def documents(source: str, *, field: str = "text") -> Iterator[str]:
    """Yields the documents of ``source`` in a fixed order.

    Args:
        source: ``stdlib``; a ``.txt``, ``.md`` or ``.py`` file (one document), a ``.jsonl`` file
            (one document per line), a ``.parquet`` file (one per row), a folder of such files, or
            ``hf:NAME`` for the train split of a HuggingFace dataset, or for a folder that
            ``save_to_disk`` wrote. Rows of parquet files and datasets without a text are skipped.
        field: Name of the text field in jsonl, parquet and datasets.

    Raises:
        InputError: the source does not exist, cannot be read, is damaged, is not UTF-8, or lacks
            the field; the message names the place.
        ImportError: parquet needs pyarrow, ``hf:`` needs datasets; the message says so.
    """
    if not source:
        raise InputError("the source is empty: expected stdlib, hf:NAME, a file or a folder")
    try:
        if source == "stdlib":
            yield from _stdlib()
        elif source.startswith("hf:"):
            yield from _dataset(source.removeprefix("hf:"), field)
        else:
            for path in _files(Path(source)):
                yield from _file(path, field)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {error.strerror}") from error


def _stdlib() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _STDLIB_SKIPPED.isdisjoint(path.relative_to(root).parts):
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                # a few sources declare another encoding on purpose
                continue


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk``, but an unreadable folder is an error, which ``os.walk`` would silently skip."""

    def refuse(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=refuse)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = [Path(folder, name) for folder, _, names in _walk(path) for name in names]
        found = sorted(p for p in found if _is_text(p))
        if not found:
            raise InputError(f"no file ending in {', '.join(_SUFFIXES)} under {path}")
        return found
    if not path.is_file():
        raise InputError(f"{path} is not there: a source is stdlib, hf:NAME, a file or a folder")
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"source must end in {', '.join(_SUFFIXES)}, got {path.name}")
    return [path]


def _is_text(path: Path) -> bool:
    """Whether a file in a folder is read; compressed texts and broken links are refused."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED and Path(path.stem).suffix.lower() in _SUFFIXES:
        raise InputError(f"{path} is compressed: expected {path.stem}")
    if suffix not in _SUFFIXES:
        return False
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} leads to {path.readlink()}, which is not there")
    return path.is_file()


def _file(path: Path, field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _jsonl(path, field)
    elif suffix == ".parquet":
        yield from _parquet(path, field)
    else:
        yield _decode(path.read_bytes(), f"{path}", 0)


def _decode(data: bytes, place: str, offset: int) -> str:
    try:
        text = data.decode("utf-8")
        # the byte order mark that some editors begin a file with is not part of its text
        return text if offset else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} must be UTF-8, got byte 0x{data[error.start]:02x} "
            f"at offset {offset + error.start}"
        ) from error


def _unicode(text: str, place: str) -> str:
    """Returns the text if it is valid Unicode: JSON can spell lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise InputError(
            f"{place} is no Unicode text: half a character, U+{half:04X}, at {error.start}"
        ) from error
    return text


def _jsonl(path: Path, field: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            place = f"{path} line {number}"
            line = _decode(raw, place, offset)
            offset += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            # nested arrays may be too deep for the parser
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                if isinstance(row, dict) and field in row:
                    got = f"{row[field]!r:.40} there"
                raise InputError(f"{place} must have a string field {field!r}, got {got}")
            yield _unicode(row[field], f"{place}, field {field!r},")


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path} needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_column(path, table.schema_arrow, field)
            for batch in table.iter_batches(columns=[field]):
                for value in batch.column(0):
                    number += 1
                    if text := value.as_py():
                        yield text
    except UnicodeDecodeError as error:
        place = f"{path} row {number}, column {field!r},"
        raise InputError(f"{place} must be UTF-8: {error}") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = first_line(error)
        raise InputError(f"{path} is damaged or no parquet file: {reason}") from error


def _check_column(path: Path, schema, field: str) -> None:
    if schema.names.count(field) != 1:
        raise InputError(f"{path} must have a column {field!r}, got {', '.join(schema.names)}")
    kind = schema.field(field).type
    if str(kind).startswith("dictionary"):
        kind = kind.value_type
    # a column of type null holds only nulls
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        raise InputError(f"{path}, column {field!r}, must be text, got {kind}")


def _dataset(name: str, field: str) -> Iterator[str]:
    if not name:
        raise InputError("hf: must be followed by a dataset's name or folder")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"hf:{name} needs datasets: pip install datasets") from error
    try:
        # a folder in which save_to_disk wrote one split
        if (Path(name) / "state.json").is_file():
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            if field not in row:
                raise InputError(f"hf:{name} must have a field {field!r}, got {', '.join(row)}")
            text, place = row[field], f"hf:{name} row {number}, field {field!r},"
            if text is not None and not isinstance(text, str):
                raise InputError(f"{place} must be text, got {text!r:.40}")
            if text:
                yield _unicode(text, place)
    except InputError:
        raise
    # a missing configuration or split, an invalid name, damaged files
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"hf:{name} cannot be read: {reason}") from error
