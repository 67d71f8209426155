"""Files that are written whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path


def write_atomic(path: Path, contents: str | bytes) -> None:
    """Replace a file; a reader sees the old or the new contents, also after a power cut.

    Args:
        path: The file; its folder must exist.
        contents: Its bytes, or a text to be written in UTF-8.

    Raises:
        OSError: it cannot be written; an older file is left as it was.
    """
    contents = contents.encode() if isinstance(contents, str) else contents
    # not the path's name with a suffix, because that may have the maximum length already
    unfinished = path.with_name(f".{os.getpid()}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        # left over if the write failed or was interrupted
        with contextlib.suppress(OSError):
            unfinished.unlink()
