"""The command ``rodimus``: how its commands are run, and how errors are shown."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from .errors import InputError
from .options import parse

# While transformers imports torchao, where that is installed, these warn of libraries for other
# devices and of how one calls the other.
_LOUD = ("torchao", "torch.utils._pytree")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (told in one line), 1 where what
    it prints cannot be written, or that of a shell for a command that a signal ended: Ctrl-C (130),
    or a pipe that nobody reads (141)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    # there is none where it was closed
    out = _Output(sys.stdout or io.StringIO())
    try:
        with contextlib.redirect_stdout(out):
            try:
                options = parse(argv)
                code = options.command(options)
            except SystemExit as stop:
                code = stop.code
            # the last words fail here, not while Python shuts down
            out.flush()
            # argparse lets nobody know that its help could not be written
            if out.error is not None:
                raise out.error
            return code or 0
    except InputError as error:
        print(f"rodimus: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error is not out.error:
            raise
        # what is left in the buffer must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"rodimus: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


class _Output:
    """Standard output that remembers why it could not be written: the same error of a file that a
    command writes keeps its traceback."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            self.error = error
            raise


if __name__ == "__main__":
    sys.exit(main())
