"""Triton's interpreter, made to find a module's builtins once.

For every call of a ``triton.jit`` function by another it replaces them, and searches the same
modules for them each time: a third to a half of the time of kernels that consist of such functions.
"""

import functools
import inspect


def find_builtins_once() -> None:
    """Have the interpreter remember which members of a module or class are builtins of Triton.

    What it does with them stays the same. Without Triton, or with one whose interpreter is built
    otherwise, nothing changes.
    """
    try:
        from triton.language.core import is_builtin
        from triton.runtime import interpreter
    except ImportError:
        return
    if not hasattr(interpreter, "_patch_builtin") or not hasattr(interpreter, "_patch_attr"):
        return

    @functools.cache
    def builtins_of(package):
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, *rest):
        for name in builtins_of(package):
            member = getattr(package, name)
            # those that are replaced already are none
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin
