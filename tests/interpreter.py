"""Triton's interpreter, made to do at once what it does many times.

A launch replaces the members of ``triton.language`` by those of the interpreter. So does every call
of a ``triton.jit`` function by another, though all is replaced by then: a third to a half of the
time of kernels that consist of such functions. Of the rest, a quarter goes into checks of integers
that are then not reported, and into the description of tensors that have all been described.
"""

import functools
import operator

import numpy as np


def speed_up() -> None:
    """Change the interpreter, whose results stay the same; but an integer that overflows is an
    error. Without Triton, or with one whose interpreter is built otherwise, nothing changes."""
    try:
        from triton import language as tl
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype")
    if not all(hasattr(interpreter, name) for name in names):
        return
    _prepare_launches_once(interpreter, tl)
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    _describe_shapes_once(tl.block_type)


def _refuse_overflow(self, a, b, binary_op):
    """The interpreter computes this from its own operations, and drops what comes of it."""
    dtype = a.type.scalar
    if 1 < dtype.int_bitwidth < 64:
        a, b = (x.handle.data.astype(np.int64) for x in (a, b))
        exact = getattr(operator, binary_op.__name__)(a, b)
        low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
        if exact.size and not low <= exact.min() <= exact.max() <= high:
            raise OverflowError(f"{dtype} {binary_op.__name__}: {exact.min()} to {exact.max()}")


def _describe_shapes_once(block_type):
    describe = block_type.__init__

    @functools.cache
    def members(dtype, shape):
        described = object.__new__(block_type)
        describe(described, dtype, shape)
        return described.name, described.shape, described.numel

    def init(self, dtype, shape):
        if type(shape) is tuple and all(type(size) is int for size in shape):
            self.element_ty = dtype
            self.name, self.shape, self.numel = members(str(dtype), shape)
        else:
            describe(self, dtype, shape)

    block_type.__init__ = init


def _prepare_launches_once(interpreter, tl):
    """Calls within a launch replace only modules that it has not replaced yet, and the interpreter
    builds its table of dtypes once."""
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
