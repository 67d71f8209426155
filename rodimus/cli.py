"""The command ``rodimus``: runs its subcommands and shows their errors."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from .errors import InputError
from .options import parse

# If torchao is installed, transformers imports it, and these then warn about libraries for other
# devices and about how torchao uses pytree.
_LOUD = ("torchao", "torch.utils._pytree")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0; 2 for bad input (reported in one line); 1 if its
    output cannot be written; or a shell's code for a command that a signal ended: 130 for Ctrl-C,
    141 for a pipe that nobody reads."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in _LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    # sys.stdout is None if it was closed
    out = _Output(sys.stdout or io.StringIO())
    try:
        with contextlib.redirect_stdout(out):
            try:
                options = parse(argv)
                code = options.command(options)
            except SystemExit as stop:
                code = stop.code
            # the last write fails here, not while Python shuts down
            out.flush()
            # argparse hides the error if its help cannot be written
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
        # the rest of the buffer must not be written again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"rodimus: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


class _Output:
    """Standard output that remembers why it could not be written, so that the same error keeps its
    traceback if it comes from another file that a command writes."""

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
