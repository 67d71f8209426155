"""What every operator shares: loading an implementation by name, and clear argument errors."""

import functools
import importlib
import logging
import types
from collections.abc import Callable, Mapping

import torch

from . import native
from ._schemas import is_transformed
from .reference import can_read_values

_logger = logging.getLogger(__name__)
# where load says what it gives out, while somebody wants to know; by id, for two may be equal
_observers: dict[int, list[str]] = {}

# Modules whose import has ended. In sys.modules they are from its beginning, for other threads too,
# and torch.compile sees that as it was when tracing began, but attributes as they are.
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
    # threads may come and go meanwhile
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
    """What the operators chose during a call: ``"module:function"``, in order, of those of an
    operator that is made of others too. For reports: other threads' operators count as well."""
    used: list[str] = []
    _observers[id(used)] = used
    try:
        call()
    finally:
        del _observers[id(used)]
    return used


# torch.compile cannot trace an import: it runs this one while compiling
@torch.compiler.assume_constant_result
def _import(module: str) -> str | None:
    try:
        setattr(_imported, module.replace(".", "_"), importlib.import_module(module))
    except ImportError as error:
        return str(error)
    return None


def runs_triton(device: torch.device) -> bool:
    """Whether ``impl="auto"`` may use Triton there, whose operators no transform of ``torch.func``
    takes; where a GPU has to do without, said once."""
    return device.type == "cuda" and not is_transformed() and _finds_triton(device)


# what torch.compile takes for constant must be a plain function
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
    """What ``impl="auto"`` means for a decode operator: the library of ``csrc/`` where it is built,
    takes these tensors and no gradient is wanted; else the fallback."""
    fits = native.fits(*tensors, one_dtype=one_dtype, is_decoding=True)
    return "native" if fits else fallback


def mark_written(*tensors: torch.Tensor) -> None:
    """Tell autograd that an operator has written tensors in place: kernels write by pointer, and a
    backward that has saved one of the tensors has to raise. What torch.compile traces is told by
    itself."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def query_scale(scale: float | None, key_dim: int) -> float:
    """The scale of queries of K channels, by default ``K ** -0.5``; raise ValueError for K = 0."""
    if key_dim == 0:
        raise ValueError("queries and keys need at least one channel, got K = 0")
    check_scale(scale)
    return key_dim**-0.5 if scale is None else scale


def check_scale(scale: float | None) -> None:
    """Raise ValueError for a tensor: it would get no gradient."""
    if isinstance(scale, torch.Tensor):
        raise ValueError("scale must be a number, got a tensor: multiply the queries by it")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ValueError unless the shape is the expected one; a string names a free dimension."""
    shape = getattr(tensor, "shape", None)
    # a token waits for dozens of these
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
        # an array of numpy has one that is text
        if not isinstance(device, torch.device):
            raise _no_tensor(name, tensor)
        raise ValueError(
            f"{name} must be on the device of {reference_name} ({reference.device}), got {device}"
        )


def check_floating(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless every tensor is floating point."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_position(position: torch.Tensor, batch: int) -> None:
    """Raise ValueError unless these are ages of sequences: int64 ``[B]``, none of them negative
    where a check may look."""
    check_shape("position", position, (batch,))
    if position.dtype != torch.int64:
        raise ValueError(f"position must be int64, got {position.dtype}")
    # a list costs half of what a comparison of tensors does
    if batch and can_read_values(position) and (lowest := min(position.tolist())) < 0:
        raise ValueError(f"position must be >= 0, got {lowest}")
