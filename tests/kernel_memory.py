"""Triton kernels in the interpreter, with every load and store checked.

Otherwise what is loaded outside a launch's tensors can go unnoticed, and the interpreter runs the
programs of a grid one after the other, where a GPU runs them in any order, and the threads of each
side by side.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

_NOBODY, _SEVERAL = -1, -2


@contextlib.contextmanager
def checked_memory() -> Iterator[None]:
    """Within it, a launch fails, with the kernel's name, where a program

    - loads or stores what is no element of the tensors that the launch was given,
    - loads what another program stores, or stores another value than it loaded or stored,
    - loads what it stored itself, without a barrier in between,
    - stores two values in one place at once.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    begin, end = executor._init_args_hst, executor._restore_args_dev
    next_program, barrier = builder.set_grid_idx, builder.create_barrier
    load, store = builder.create_masked_load, builder.create_masked_store
    launch: _Launch | None = None

    def checked_begin(self, *given):
        nonlocal launch
        args, named = begin(self, *given)
        launch = _Launch(self.fn.__name__, [*args, *named.values()])
        return args, named

    def checked_end(self, *given):
        nonlocal launch
        launch = None
        return end(self, *given)

    def checked_program(self, *place):
        launch.program += 1
        launch.barriers += 1
        return next_program(self, *place)

    def checked_barrier(self):
        launch.barriers += 1
        return barrier(self)

    def checked_load(self, pointers, mask, *rest, **named):
        launch.load(_chosen(pointers, mask))
        return load(self, pointers, mask, *rest, **named)

    def checked_store(self, pointers, value, mask, *rest, **named):
        before = load(self, pointers, mask, None, *rest, is_volatile=False, **named)
        launch.store(*(_chosen(x, mask) for x in (pointers, value, before)))
        return store(self, pointers, value, mask, *rest, **named)

    changes = {
        (executor, "_init_args_hst"): checked_begin,
        (executor, "_restore_args_dev"): checked_end,
        (builder, "set_grid_idx"): checked_program,
        (builder, "create_barrier"): checked_barrier,
        (builder, "create_masked_load"): checked_load,
        (builder, "create_masked_store"): checked_store,
    }
    with contextlib.ExitStack() as patches:
        for (owner, name), changed in changes.items():
            patches.enter_context(mock.patch.object(owner, name, changed))
        yield


class _Storage:
    """What the programs of a launch have done with each byte where an element begins."""

    def __init__(self, storage):
        self.first, size = storage.data_ptr(), storage.nbytes()
        self.is_given = np.zeros(size, bool)
        self.reader, self.writer = (np.full(size, _NOBODY, np.int32) for _ in range(2))
        self.stored_after = np.zeros(size, np.int32)


class _Launch:
    def __init__(self, kernel, args):
        self.kernel, self.program, self.barriers = kernel, -1, 0
        self.storages: dict[int, _Storage] = {}
        for arg in args:
            tensor = getattr(arg, "base", arg)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._give(tensor)

    def _give(self, tensor):
        storage = tensor.untyped_storage()
        known = self.storages.setdefault(storage.data_ptr(), _Storage(storage))
        elements = torch.arange(storage.nbytes() // tensor.element_size())
        elements = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        known.is_given[elements.numpy().ravel() * tensor.element_size()] = True

    def load(self, addresses):
        for storage, at, _ in self._places("load", addresses):
            writer, reader = storage.writer[at], storage.reader[at]
            self._refuse(self._is_another(writer), "loads what another program stores")
            fresh = (writer == self.program) & (storage.stored_after[at] == self.barriers)
            self._refuse(fresh, "loads what it stored, without a barrier in between")
            storage.reader[at] = np.where(self._is_another(reader), _SEVERAL, self.program)

    def store(self, addresses, values, before):
        bits = f"u{values.itemsize}"
        values, before = values.view(bits), before.view(bits)
        _, first, place = np.unique(addresses, return_index=True, return_inverse=True)
        self._refuse(values[first][place] != values, "stores two values in one place")
        for storage, at, here in self._places("store", addresses):
            is_changed = values[here] != before[here]
            for what, by in (("loads", storage.reader[at]), ("stores", storage.writer[at])):
                refused = self._is_another(by) & is_changed
                self._refuse(refused, f"stores another value than another program {what}")
            storage.writer[at], storage.stored_after[at] = self.program, self.barriers

    def _places(self, what, addresses):
        """``(storage, bytes from its beginning, which of the addresses)``."""
        outside = np.ones(len(addresses), bool)
        for storage in self.storages.values():
            at = addresses.astype(np.int64) - storage.first
            here = (at >= 0) & (at < len(storage.is_given))
            here[here] = storage.is_given[at[here]]
            outside &= ~here
            if here.any():
                yield storage, at[here], here
        self._refuse(outside, f"{what}s outside its tensors")

    def _is_another(self, program):
        return (program != _NOBODY) & (program != self.program)

    def _refuse(self, places, what):
        if places.any():
            raise AssertionError(f"program {self.program} of {self.kernel} {what}")


def _chosen(handle, mask):
    """The entries of a block under its mask."""
    # in Triton 3.6 the mask of a descriptor is an array, whose data is a view of memory
    mask = np.asarray(mask.data).astype(bool)
    return np.broadcast_to(handle.data, mask.shape)[mask]
