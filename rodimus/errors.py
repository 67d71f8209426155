"""What went wrong outside the program."""


class InputError(ValueError):
    """Something given to the program is missing, damaged or contradictory.

    Its message says what was expected and what was given. The command line prints it as one line
    and exits with code 2; everything else keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error message."""
    return (str(error).strip() or repr(error)).splitlines()[0]
