"""Triton's interpreter, made to prepare a kernel's launch once.

A launch replaces the members of ``triton.language`` by those of the interpreter. So does every call
of a ``triton.jit`` function by another, though all is replaced by then: a third to a half of the
time of kernels that consist of such functions.
"""

import functools


def prepare_launches_once() -> None:
    """Have calls within a launch replace only modules that it has not replaced yet, and have the
    interpreter build its table of dtypes once.

    The results stay the same. Without Triton, or with one whose interpreter is built otherwise,
    nothing changes.
    """
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in names):
        return
    patch_all, replaced = interpreter._patch_lang, set()

    @functools.cache
    def modules_of(fn):
        return frozenset(x for x in fn.__globals__.values() if x is tl or x is tl.core)

    def patch_lang(fn):
        modules = modules_of(fn)
        if modules and modules <= replaced:
            return interpreter._LangPatchScope()
        scope, is_launch = patch_all(fn), not replaced
        replaced.update(modules)
        if is_launch:
            restore = scope.restore

            def restore_all():
                replaced.clear()
                restore()

            scope.restore = restore_all
        return scope

    dtype_of = interpreter._get_np_dtype
    dtype_of_scalar = functools.cache(dtype_of)

    def get_np_dtype(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return (dtype_of_scalar if type(element) is tl.dtype else dtype_of)(element)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype
