"""What every operator shares: loading an implementation by name, and clear argument errors."""

import functools
import importlib
import logging
import types
from collections.abc import Callable, Mapping
from numbers import Integral
from operator import index

import torch

from . import native
from ._schemas import is_transformed
from .reference import can_read_values

_logger = logging.getLogger(__name__)
# lists to which load adds what it returns, for implementations_used; by id, as two may be equal
_observers: dict[int, list[str]] = {}

# Modules whose import is complete. sys.modules holds a module from the start of its import, also
# for other threads, and torch.compile sees the state of sys.modules from when tracing began, but
# the current attributes of a module.
_imported = types.ModuleType("imported")


def load(operator: str, impl: str, implementations: Mapping[str, str]) -> Callable:
    """The function of ``impl``, imported on first use.

    Args:
        operator: public name, for the message.
        impl: a key of ``implementations``.
        implementations: implementation name to ``"module:function"``.

    Raises:
        ValueError: no such implementation.
        ImportError: it exists, but what it needs is not installed.
    """
    if impl not in implementations:
        names = ", ".join(map(repr, ("auto", *implementations)))
        raise ValueError(f"{operator}: unknown impl {impl!r}; expected one of {names}")
    # a copy, because other threads may add or remove observers meanwhile
    for used in tuple(_observers.values()):
        used.append(implementations[impl])
    module, function = implementations[impl].split(":")
    place = module.replace(".", "_")
    traced = torch.compiler.is_dynamo_compiling()
    failure = None if not traced and hasattr(_imported, place) else _import(module)
    if failure is not None:
        raise ImportError(
            f"{operator}(impl={impl!r}) cannot be loaded: {failure}."
            " Install what it needs, or pass impl='auto'."
        )
    return getattr(getattr(_imported, place), function)


def implementations_used(call: Callable[[], object]) -> list[str]:
    """Implementations that operators chose during a call, in order, as ``"module:function"``; also
    of operators called by operators. For reports: those of other threads are included as well."""
    used: list[str] = []
    _observers[id(used)] = used
    try:
        call()
    finally:
        del _observers[id(used)]
    return used


# torch.compile cannot trace an import: it calls this function while compiling
@torch.compiler.assume_constant_result
def _import(module: str) -> str | None:
    try:
        setattr(_imported, module.replace(".", "_"), importlib.import_module(module))
    except ImportError as error:
        return str(error)
    return None


def runs_triton(device: torch.device) -> bool:
    """Whether ``impl="auto"`` may use Triton on this device; its operators do not support the
    transforms of ``torch.func``. Warns once about a GPU that cannot use it."""
    return device.type == "cuda" and not is_transformed() and _finds_triton(device)


# assume_constant_result needs a plain function, and a cached one is not
@torch.compiler.assume_constant_result
def _finds_triton(device):
    return _gpu_runs_triton(device)


@functools.cache
def _gpu_runs_triton(device: torch.device) -> bool:
    failure = _import("triton")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        failure = f"compute capability {major}.{minor} is below 8.0"
    if torch.version.hip:
        failure = "the kernels are written for NVIDIA GPUs"
    if failure is not None:
        _logger.warning("torch operations instead of Triton kernels on %s: %s", device, failure)
    return failure is None


def choose_compiled(fallback: str, *tensors: torch.Tensor | None, one_dtype: bool = False) -> str:
    """What ``impl="auto"`` means for a decode operator: the library of ``csrc/`` if it is built and
    takes these tensors, and no gradient is wanted; else the fallback."""
    fits = native.fits(*tensors, one_dtype=one_dtype, is_decoding=True)
    return "native" if fits else fallback


def mark_written(*tensors: torch.Tensor) -> None:
    """Tell autograd that an operator has written tensors in place: kernels write by pointer, and a
    backward that has saved one of the tensors has to raise. torch.compile does so by itself for the
    code that it traces."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def query_scale(scale: float | None, key_dim: int) -> float:
    """The scale of queries of K channels, by default ``K ** -0.5``; raise ValueError for K = 0."""
    if key_dim == 0:
        raise ValueError("queries and keys need at least one channel, got K = 0")
    check_scale(scale)
    return key_dim**-0.5 if scale is None else scale


def check_scale(scale: float | None) -> None:
    """Raise ValueError for a tensor, because it would get no gradient."""
    if isinstance(scale, torch.Tensor):
        raise ValueError("scale must be a number, got a tensor: multiply the queries by it")


def plain_integer(name: str, value: int | None) -> int | None:
    """A size as an integer of Python, also if it is one of numpy; None and symbolic sizes as they
    are. Raises ValueError for anything else, booleans included."""
    if value is None or type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return index(value)


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape is the expected one; a string names a free dimension."""
    shape = getattr(tensor, "shape", None)
    # the fast path: decoding a token makes dozens of these checks
    if shape == expected:
        return
    if shape is None:
        raise _no_tensor(name, tensor)
    fits = len(shape) == len(expected)
    for got, want in zip(shape, expected, strict=False):
        fits = fits and (got == want or isinstance(want, str))
    if not fits:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape [{wanted}], got {tuple(shape)}")


def check_vectors(name: str, tensor: torch.Tensor, width: str) -> None:
    """Raise ValueError unless the argument is a tensor ``[..., width]``, of any width."""
    shape = getattr(tensor, "shape", None)
    if shape is None:
        raise _no_tensor(name, tensor)
    if len(shape) == 0:
        raise ValueError(f"{name} must have shape [..., {width}], got ()")


def _no_tensor(name, value):
    return ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_same_device(
    reference_name: str, reference: torch.Tensor, **others: torch.Tensor | None
) -> None:
    """Raise ValueError unless the others live on the reference's device."""
    for name, tensor in others.items():
        device = getattr(tensor, "device", None)
        if tensor is None or device == reference.device:
            continue
        # a numpy array has a device too, which is a string
        if not isinstance(device, torch.device):
            raise _no_tensor(name, tensor)
        raise ValueError(
            f"{name} must be on the device of {reference_name} ({reference.device}), got {device}"
        )


def check_floating(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless every tensor is floating point."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise _no_tensor(name, tensor)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_position(position: torch.Tensor, batch: int) -> None:
    """Raise ValueError unless these are positions: int64 ``[B]``, and not negative where values may
    be read."""
    check_shape("position", position, (batch,))
    if position.dtype != torch.int64:
        raise ValueError(f"position must be int64, got {position.dtype}")
    # the minimum of a list takes half the time of a comparison of tensors
    if batch and can_read_values(position) and (lowest := min(position.tolist())) < 0:
        raise ValueError(f"position must be >= 0, got {lowest}")
