"""The native operators of ``csrc/`` seen from Python: schemas, fakes, and loading the libraries.

Schemas and fakes are here rather than in C++, so that torch.compile, ``opcheck`` and a library
built for one device all know every operator, and an operator without its library fails with torch's
own message. The libraries only add implementations; ``rodimus_kernels.build`` makes them.

All operators take dense rows in float32 or bfloat16; on a CPU the matrices of linear layers may
also be quantised, with scales. States are float32 and written in place.
None of them is differentiable: the public functions choose them only where no gradient is needed.
"""

import ctypes
import functools
import logging
import os

import torch

from . import build
from ._schemas import is_transformed, refuse_forward_mode
from .quantized_weight import QUANTIZED, Int8Weight, QuantizedWeight

logger = logging.getLogger(__name__)

_SCHEMAS = {
    "ddts_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor(a!) state, float scale) -> Tensor"
    ),
    "ddts_mixer_step": (
        "(Tensor q, Tensor k, Tensor select, Tensor temper, Tensor gate_hidden, Tensor x,"
        " Tensor shifted, Tensor gate, Tensor(a!) state, Tensor gate_weight, Tensor gate_bias,"
        " Tensor residual_weight, Tensor norm_weight, float scale, float key_eps, float norm_eps)"
        " -> Tensor"
    ),
    "short_conv_step": ("(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias) -> Tensor"),
    "short_conv": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx) -> Tensor"
    ),
    "linear_step": "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale=None) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor stream)"
    ),
    "gated_rms_norm": (
        "(Tensor x, Tensor gate, Tensor weight, Tensor? residual, Tensor? residual_weight,"
        " float eps) -> Tensor"
    ),
    "shared_key_attention_step": (
        "(Tensor q, Tensor k, Tensor v, Tensor(a!) cache, Tensor position, int window_size,"
        " float scale) -> Tensor"
    ),
    "blocks_step": (
        "(Tensor stream, Tensor[] weights, Tensor[] scales, Tensor(a!)[] taps,"
        " Tensor(b!)[] states, Tensor(c!)[] rings, Tensor? position, Tensor? cos, Tensor? sin,"
        " int window_size, int head_dim, float key_eps, float norm_eps, bool persistent) -> Tensor"
    ),
}
CPU_ISAS = tuple(build.CPU_ISAS)
DTYPES = (torch.float32, torch.bfloat16)
_KINDS = (torch.Tensor, torch.nn.Parameter)
MAX_ROWS = 8
"""Most rows of x that the native :func:`rodimus_kernels.linear` takes."""
MAX_CPU_ROWS = 4 * MAX_ROWS
"""Up to this many rows, reading all weights again for each ``MAX_ROWS`` of them is faster on a CPU
than torch's products in float32: at 16 rows 3 times as fast for a small model and 1.5 times for the
1.6B's blocks, at 32 rows of these equally fast; against widened weights the break-even was between
24 and 64 rows (2 cores with AVX2)."""
MAX_TAPS = 8
"""Most taps of the convolution of a sequence, which exists on a CPU only."""
MAX_CUDA_KEYS, MAX_CUDA_HEAD_DIM = 128, 256
"""Most keys of a state, and most channels of a head, that the operators take on a GPU."""
_NOT_BUILT = "they are not built; build them with: python -m rodimus_kernels build"

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"rodimus::native_{_name}", _schema)


@torch.library.register_fake("rodimus::native_ddts_step")
def _(q, k, v, log_decay, state, scale):
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.register_fake("rodimus::native_ddts_mixer_step")
def _(q, k, select, temper, gate_hidden, x, *_):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::native_short_conv_step")
def _(x, conv_state, weight, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::native_short_conv")
def _(x, weight, bias, initial_state, seq_idx):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::native_linear_step")
def _(x, weight, bias, scale=None):
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("rodimus::native_rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape, dtype=weight.dtype)


@torch.library.register_fake("rodimus::native_add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape, dtype=weight.dtype), residual.new_empty(residual.shape)


@torch.library.register_fake("rodimus::native_gated_rms_norm")
def _(x, gate, weight, residual, residual_weight, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("rodimus::native_shared_key_attention_step")
def _(q, k, v, cache, position, window_size, scale):
    return v.new_empty((*q.shape[:3], v.shape[3]))


@torch.library.register_fake("rodimus::native_blocks_step")
def _(stream, *_):
    return stream.new_empty(stream.shape)


# ------------------------------------------------------------------------------------------ loading


# torch.compile must not trace access to the file system: it calls this function while compiling
@torch.compiler.assume_constant_result
def is_available(device_type: str) -> bool:
    """Whether the native operators of ``"cpu"`` or ``"cuda"`` can be called; loads their library on
    first use."""
    return problem(device_type) is None


@torch.compiler.assume_constant_result
def _can_decode(device_type: str) -> bool:
    """Like :func:`is_available`, but warns once if the library is missing."""
    found = is_available(device_type)
    if not found:
        _say_if_not_built(device_type)
    return found


@functools.cache
def _say_if_not_built(device_type):
    declined = os.environ.get(f"RODIMUS_BUILD_{device_type.upper()}") == "0"
    if problem(device_type) == _NOT_BUILT and not declined:
        logger.warning(
            "decoding on %s is slower than it could be without the native operators: %s",
            device_type,
            _NOT_BUILT,
        )


@functools.cache
def problem(device_type: str) -> str | None:
    """Why there are no native operators for a device, or None when they are loaded."""
    if device_type not in build.LIBRARIES:
        return f"there are none for device {device_type!r}"
    library = build.PACKAGE / build.LIBRARIES[device_type]
    if not library.is_file():
        return _NOT_BUILT
    folder = build.sources()
    if folder is not None and build.recorded_digest(library) != build.digest(folder):
        stale = (
            f"{library.name} was built from other sources than those in {folder.name}/;"
            " build it again with: python -m rodimus_kernels build"
        )
        logger.warning("native operators are not used: %s", stale)
        return stale
    try:
        torch.ops.load_library(library)
    except OSError as error:
        logger.warning("native operators are not used: %s", error)
        return f"{library.name} cannot be loaded: {error}"
    return None


def require(operator: str, device_type: str) -> None:
    """Raise ImportError unless the native operators of a device can be called."""
    if not is_available(device_type):
        reason = problem(device_type)
        raise ImportError(f"{operator}(impl='native') needs the native operators: {reason}")


def cpu_isa() -> str | None:
    """The instruction set the CPU operators use, one of ``CPU_ISAS``: the best the processor has.
    None where the operators are not available."""
    if not is_available("cpu"):
        return None
    function = ctypes.CDLL(build.PACKAGE / build.LIBRARIES["cpu"]).rodimus_cpu_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def select_cpu_isa(name: str) -> bool:
    """Use another instruction set, to test or to measure it. Returns False and changes nothing if
    the processor lacks it."""
    require("select_cpu_isa", "cpu")
    library = ctypes.CDLL(build.PACKAGE / build.LIBRARIES["cpu"])
    return bool(library.rodimus_cpu_select_isa(name.encode()))


def fits(
    *tensors: torch.Tensor | QuantizedWeight | None,
    one_dtype: bool = False,
    is_decoding: bool = False,
) -> bool:
    """Whether ``impl="auto"`` may choose the native form for these tensors: they are plain float32
    or bfloat16 tensors or, on a CPU, quantised weights; the operators of their device are built; no
    gradient has to be recorded and no transform of ``torch.func`` is active.

    Args:
        tensors: the arguments of the operator; None for one that is not given.
        one_dtype: the operator needs all of them to have the same dtype.
        is_decoding: the call is part of decoding: if only the library is missing, warn about it
            once per process and device, unless ``RODIMUS_BUILD_CPU`` or ``_CUDA`` is 0.
    """
    if is_transformed():
        return False
    records, dtypes, kind = torch.is_grad_enabled(), DTYPES, None
    for x in tensors:
        if x is None:
            continue
        if type(x) in QUANTIZED:
            if not _is_quantized_on_cpu(x):
                return False
            x = x.scale
        if type(x) not in _KINDS or x.dtype not in dtypes or (records and x.requires_grad):
            return False
        if kind is None:
            place, dtypes = x.device, (x.dtype,) if one_dtype else DTYPES
            kind = place.type
    if kind not in build.LIBRARIES or (kind == "cuda" and not _runs_here(place)):
        return False
    return _can_decode(kind) if is_decoding else is_available(kind)


# assume_constant_result needs a plain function, and a cached one is not
@torch.compiler.assume_constant_result
def _runs_here(device: torch.device) -> bool:
    """Whether the library can run on this GPU; if it cannot, the reason is logged once."""
    found = _lacks_code(device)
    if found is not None:
        _warn_once(found)
    return found is None


@functools.cache
def _lacks_code(device):
    """Why the library cannot run on a GPU, or None."""
    capability = torch.cuda.get_device_capability(device)
    name = "{}.{}".format(*capability)
    if capability < (8, 0):
        return f"they need compute capability 8.0, this GPU has {name}"
    library = build.PACKAGE / build.LIBRARIES["cuda"]
    if not library.is_file():
        return None
    problem = _cuda_problem()
    if problem is not None:
        return (
            f"the CUDA runtime in {library.name} cannot run here ({problem}); build it again with"
            " an nvcc that is not newer than the driver"
        )
    archs = build.recorded_archs(library)
    if archs is None or build.has_code_for(archs, capability):
        return None
    return (
        f"{library.name} was built for {archs}, this GPU has compute capability {name}; build it"
        " again with: RODIMUS_CUDA_ARCHS={}{} python -m rodimus_kernels build".format(*capability)
    )


def _cuda_problem() -> str | None:
    """Why the CUDA runtime inside the library cannot run, or None; torch's own may still run. None,
    too, where the library is not loaded, for which :func:`problem` has the reason."""
    if not is_available("cuda"):
        return None
    function = ctypes.CDLL(build.PACKAGE / build.LIBRARIES["cuda"]).rodimus_cuda_problem
    function.restype = ctypes.c_char_p
    problem = function()
    return None if problem is None else problem.decode()


@functools.cache
def _warn_once(reason):
    logger.warning("native operators are not used: %s", reason)


def _is_quantized_on_cpu(weight):
    values, scale = weight[:2]
    found = (values.dtype, scale.dtype, values.device.type)
    return type(values) is torch.Tensor and found == (*_quantized_dtypes(weight), "cpu")


def _quantized_dtypes(weight):
    """Dtypes of values and scale."""
    is_int8 = type(weight) is Int8Weight
    return (torch.int8, torch.float32) if is_int8 else (torch.uint8, torch.bfloat16)


def check(
    operator: str, *tensors: torch.Tensor | QuantizedWeight | None, one_dtype: bool = False
) -> None:
    """Raise unless an explicit ``impl="native"`` can take these tensors.

    Raises:
        ValueError: a dtype is not float32 or bfloat16, quantised weights are not on a CPU or have
            wrong dtypes, dtypes differ where the operator needs a single one, or a derivative is
            wanted.
        ImportError: the device has no native operators here.
    """
    if fits(*tensors, one_dtype=one_dtype):
        return
    given = [x.scale if type(x) in QUANTIZED else x for x in tensors if x is not None]
    dtypes = {x.dtype for x in given}
    wrong = sorted(str(dtype) for dtype in dtypes if dtype not in DTYPES)
    if wrong:
        raise ValueError(
            f"{operator}(impl='native') takes float32 and bfloat16, got {', '.join(wrong)}"
        )
    for x in tensors:
        if type(x) in QUANTIZED and not _is_quantized_on_cpu(x):
            values, scale = _quantized_dtypes(x)
            raise ValueError(
                f"{operator}(impl='native') takes the {type(x).__name__} of {values} values with"
                f" {scale} scales on a CPU, got {x.values.dtype} with {x.scale.dtype} on"
                f" {x.device.type}"
            )
    if one_dtype and len(dtypes) > 1:
        names = " and ".join(sorted(map(str, dtypes)))
        raise ValueError(f"{operator}(impl='native') takes tensors of one dtype, got {names}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError(
            f"{operator}(impl='native') has no gradient; call it under torch.no_grad()"
        )
    refuse_forward_mode(operator)
    device = given[0].device
    require(operator, device.type)
    if device.type == "cuda" and _lacks_code(device):
        raise ImportError(f"{operator}(impl='native') cannot run here: {_lacks_code(device)}")


def has_dense_rows(x: torch.Tensor) -> bool:
    """Whether the operators take a matrix or a vector without a copy, as they do for one half of a
    wider projection."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def dense_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """A matrix or a vector with dense rows; copied if its rows are not dense. None stays None."""
    return x if x is None or has_dense_rows(x) else x.contiguous()
