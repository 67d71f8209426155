"""The operators around the mixers by device time: loss, norms, rotation, MLP activation,
convolution and gates, forward and with all gradients.

Shapes are those of a layer and of the head of the 1.6B model. Peers are the same operators made of
torch functions, eager and compiled. On a GPU every call is a CUDA graph of several runs. Before
anything is timed, values and gradients on the same inputs are compared with float64 on the device.

    floor   the longer of two times: bytes (each input and output once in each direction) over the
            measured copy rate, and GEMMs over the measured rate of a large one
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rodimus import RodimusConfig
from rodimus_kernels import (
    add_rms_norm,
    ddts_gates,
    gated_rms_norm,
    input_gate,
    linear_cross_entropy,
    reference,
    rms_norm,
    rope,
    rope_tables,
    short_conv,
    swiglu,
)
from rodimus_kernels.testing import relative_error

from . import operators, peers, records, sizes
from .operators import Call

RANK, EPS = 32, 1e-5

NORMS = ("rms_norm", "add_rms_norm", "gated_rms_norm")
ELEMENTWISE = (*NORMS, "rope", "swiglu", "short_conv", "input_gate", "ddts_gates")
PASSES = ("forward", "training")

# what, operator, batch, length
POINTS = {
    "tiny": [(what, name, 2, 20) for name in ("loss", *ELEMENTWISE) for what in PASSES],
    # the kernels are for GPUs; on a CPU the torch forms run
    "cpu": [],
    "cuda": [
        *((what, "loss", 1, 8192) for what in PASSES),
        *((what, name, 8, 4096) for name in ELEMENTWISE for what in PASSES),
    ],
}


class Shape(NamedTuple):
    """Sizes of an operator's inputs."""

    batch: int
    length: int
    hidden: int
    inner: int
    keys: int
    mlp: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, scale: str, batch: int, length: int) -> "Shape":
        """The sizes of Rodimus+ at a scale."""
        fields = sizes.config_of("rodimus_plus", scale)
        config = RodimusConfig(**{**fields, "bos_token_id": None, "eos_token_id": None})
        mixer = config.mixer_cfg
        inner = int(config.d_model * mixer["expand_ratio"])
        widths = config.d_model, inner, mixer["mem_size"], config.intermediate_size
        return cls(batch, length, *widths, config.num_attention_heads, config.vocab_size)


class Operator(NamedTuple):
    """An operator, its inputs and its peer.

    Attributes:
        function: Ours, of inputs and constants; takes ``impl``.
        plain: The same operator made of torch functions.
        inputs: Arguments that get gradients.
        constants: Arguments that get none.
        again: Tensors that backward must read besides the gradients of the outputs.
        flops: Operations of the forward's GEMMs; the backward has twice as many.
        limit: Limit of relative errors, if float32 results are computed from coarser values.
    """

    function: Callable[..., object]
    plain: Callable[..., object]
    inputs: tuple[torch.Tensor, ...]
    constants: tuple[torch.Tensor, ...] = ()
    again: tuple[torch.Tensor, ...] = ()
    flops: int = 0
    limit: float = 0.0

    def ours(self, impl: str) -> Callable[..., object]:
        """The function in one of its implementations."""
        return functools.partial(self.function, impl=impl)

    def work(self, what: str, impl: str) -> tuple[int, int | None]:
        """Bytes and operations that no implementation of a pass can avoid."""
        with torch.no_grad():
            outputs = size(*results(self.ours(impl), self))
        moved = size(*self.inputs, *self.constants) + outputs
        if what == "training":
            moved += size(*self.again) + outputs + size(*self.inputs)
        return moved, {"forward": 1, "training": 3}[what] * self.flops or None


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors."""
    return sum(x.nbytes for x in tensors)


# ----------------------------------------------------------------------------------------------
# The operators: ours, torch's, and inputs
# ----------------------------------------------------------------------------------------------


def loss(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Head and cross entropy; both gradients are taken while a chunk's logits exist."""
    hidden = normal(shape.batch * shape.length, shape.hidden)
    weight = normal(shape.vocabulary, shape.hidden) * shape.hidden**-0.5
    labels = normal(len(hidden)).float().abs().mul(1e4).long() % shape.vocabulary

    def plain(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    return Operator(
        lambda *tensors, impl: linear_cross_entropy(*tensors, impl=impl)[0],
        plain,
        (hidden, weight),
        (labels,),
        flops=2 * hidden.numel() * shape.vocabulary,
        # logits of about 1 are rounded to 8 bits, 1e-3 each, and their loss is log(vocabulary)
        limit=1e-3 if hidden.dtype == torch.bfloat16 else 0.0,
    )


def plain_norm(x, weight):
    """``rms_norm`` in weight's dtype."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS).to(weight.dtype)


def plain_add_norm(x, residual, weight):
    """``add_rms_norm``."""
    stream = residual + x
    return plain_norm(stream, weight), stream


def plain_gated_norm(x, gate, residual, residual_weight, weight):
    """``gated_rms_norm``."""
    return plain_norm(torch.addcmul(x, residual, residual_weight) * F.silu(gate), weight)


def norm(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Norm of the float32 stream."""
    x, weight = normal(shape.batch, shape.length, shape.hidden).float(), normal(shape.hidden)
    function = functools.partial(rms_norm, eps=EPS)
    return Operator(function, plain_norm, (x, weight), again=(x, weight))


def add_norm(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Norm of the float32 stream plus a branch; backward reads the sum, as large as the stream."""
    x, weight = normal(shape.batch, shape.length, shape.hidden), normal(shape.hidden)
    inputs = x, normal(*x.shape).float(), weight
    function = functools.partial(add_rms_norm, eps=EPS)
    return Operator(function, plain_add_norm, inputs, again=inputs[1:])


def gated_norm(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Gated norm after the mixer; the gate is half of a projection."""
    x, residual = (normal(shape.batch, shape.length, shape.inner) for _ in range(2))
    inputs = x, halves(shape, normal)[1], residual, normal(shape.inner), normal(shape.inner)

    def function(x, gate, residual, residual_weight, weight, *, impl):
        more = {"residual": residual, "residual_weight": residual_weight}
        return gated_rms_norm(x, gate, weight, eps=EPS, **more, impl=impl)

    return Operator(function, plain_gated_norm, inputs, again=inputs)


def halves(shape: Shape, normal: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """x and gate of the mixer, the two halves of one projection."""
    return normal(shape.batch, shape.length, 2 * shape.inner).chunk(2, dim=-1)


def rotation(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Rotation of the queries; the gradient is another rotation."""
    q = normal(shape.batch, shape.length, shape.heads, shape.hidden // shape.heads)
    positions = torch.arange(shape.length, device=q.device)[None]
    tables = rope_tables(positions, q.shape[-1], dtype=q.dtype)
    return Operator(rope, reference.rope, (q,), tables, again=tables)


def plain_swiglu(projection):
    """``swiglu``."""
    x, gate = projection.chunk(2, dim=-1)
    return F.silu(gate) * x


def activation(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Activation of the MLP."""
    inputs = (normal(shape.batch, shape.length, 2 * shape.mlp),)
    return Operator(swiglu, plain_swiglu, inputs, again=inputs)


def plain_conv(x, weight, bias):
    """``short_conv``."""
    length, width = x.shape[1], weight.shape[1]
    y = F.conv1d(x.mT, weight[:, None], bias, padding=width - 1, groups=x.shape[2])
    return F.silu(y[..., :length]).mT


def convolution(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Convolution of half a projection, with silu."""
    inputs = halves(shape, normal)[0], normal(shape.inner, 4), normal(shape.inner)
    function = lambda *tensors, impl: short_conv(*tensors, impl=impl)[0]
    return Operator(function, plain_conv, inputs, again=inputs)


def plain_input_gate(x, hidden, weight, bias):
    """``input_gate``."""
    return F.linear(hidden, weight, bias).sigmoid() * x


def value_gate(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Gate of half a projection, from a low-rank product."""
    hidden, weight = normal(shape.batch, shape.length, RANK), normal(shape.inner, RANK)
    inputs = halves(shape, normal)[0], hidden, weight * RANK**-0.5, normal(shape.inner)
    flops = 2 * hidden.numel() * shape.inner
    return Operator(input_gate, plain_input_gate, inputs, again=inputs, flops=flops)


def tempered_gates(shape: Shape, normal: Callable[..., torch.Tensor]) -> Operator:
    """Keys and decays, from three quarters of a projection."""
    projection = normal(shape.batch, shape.length, 1, 4 * shape.keys)
    inputs = projection.split(shape.keys, dim=-1)[1:]
    return Operator(ddts_gates, reference.ddts_gates, inputs, again=inputs)


OPERATORS: dict[str, Callable[[Shape, Callable[..., torch.Tensor]], Operator]] = {
    "loss": loss,
    "rms_norm": norm,
    "add_rms_norm": add_norm,
    "gated_rms_norm": gated_norm,
    "rope": rotation,
    "swiglu": activation,
    "short_conv": convolution,
    "input_gate": value_gate,
    "ddts_gates": tempered_gates,
}


def make(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Operator:
    """An operator with random inputs on the device."""
    normal = lambda *sizes: torch.randn(*sizes, device=device, dtype=dtype)
    return OPERATORS[name](shape, normal)


# ----------------------------------------------------------------------------------------------
# Passes and the comparison before they are timed
# ----------------------------------------------------------------------------------------------


def results(function: Callable[..., object], operator: Operator) -> tuple[torch.Tensor, ...]:
    """The outputs, as a tuple."""
    found = function(*operator.inputs, *operator.constants)
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def pass_of(
    what: str, function: Callable[..., object], operator: Operator, do: tuple[torch.Tensor, ...]
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that runs a pass: the outputs, or the gradients of all inputs, given ``do``."""
    if what == "forward":
        return torch.no_grad()(lambda: results(function, operator))
    leaves = tuple(x.detach().requires_grad_() for x in operator.inputs)
    operator = operator._replace(inputs=leaves)
    return lambda: torch.autograd.grad(results(function, operator), leaves, do)


def exact_passes(
    what: str, operator: Operator, do: tuple[torch.Tensor, ...]
) -> dict[str, tuple[torch.Tensor, ...]]:
    """Correct results by pass, from the reference in float64; for training the outputs as well."""
    wide = lambda tensors: tuple(x.double() if x.is_floating_point() else x for x in tensors)
    names = PASSES if what == "training" else PASSES[:1]
    operator = operator._replace(inputs=wide(operator.inputs), constants=wide(operator.constants))
    return {name: pass_of(name, operator.ours("reference"), operator, wide(do))() for name in names}


def errors_of(
    function: Callable[..., object],
    operator: Operator,
    do: tuple[torch.Tensor, ...],
    exact: dict[str, tuple[torch.Tensor, ...]],
) -> list[tuple[float, float]]:
    """Relative error of each output and gradient, and the limit of its dtype."""
    limit_of = lambda x: max(operators.LIMITS[x.dtype], operator.limit)
    return [
        (relative_error(found, expected), limit_of(found))
        for what, tensors in exact.items()
        for found, expected in zip(pass_of(what, function, operator, do)(), tensors, strict=True)
    ]


def calls_of(
    what: str,
    name: str,
    operator: Operator,
    impl: str,
    others: dict[str, Callable[..., object]],
) -> tuple[dict[str, Call | str], float]:
    """The calls to time of an operator, by name, and our largest error.

    Args:
        what: One of ``PASSES``.
        name: The operator's name.
        impl: Our implementation, which must be correct.
        others: Peers by engine; for one that fails or is wrong, the reason replaces the call.
    """
    with torch.no_grad():
        do = tuple(torch.randn_like(x) for x in results(operator.ours(impl), operator))
    exact = exact_passes(what, operator, do)
    floor_bytes, flops = operator.work(what, impl)
    calls: dict[str, Call | str] = {}
    largest = 0.0
    for engine, function in {impl: operator.ours(impl), **others}.items():
        label = f"{name}/{engine}"
        try:
            check = functools.partial(errors_of, function, operator, do, exact)
            errors = check() if not calls else peers.guarded(check, operators.PEER_LIMIT_SECONDS)
            for error, limit in errors:
                if not error <= limit:
                    raise peers.Fault(f"wrong: relative error {error:.1e}, limit {limit:.0e}")
        except peers.Unavailable as reason:
            if not calls:
                raise
            calls[label] = str(reason)
            continue
        largest = largest if calls else max(error for error, _ in errors)
        run = pass_of(what, function, operator, do)
        calls[label] = Call(run, floor_bytes, flops=flops)
    return calls, largest


def peers_of(operator: Operator, device: torch.device) -> dict[str, Callable[..., object]]:
    """The same operator made of torch functions; on a GPU also compiled."""
    found = {"torch": operator.plain}
    if device.type == "cuda":
        # torch stops compiling a function after eight shapes
        torch.compiler.reset()
        found["compiled"] = torch.compile(operator.plain)
    return found


def test_fused(bench, benchmark, start, point):
    what, name, batch, length = point
    case = f"{bench.case(batch, length)}-{name}"
    start(f"fused-{what}", case)
    operator = make(name, Shape.of(bench.scale, batch, length), bench.device, bench.dtype)
    impl = "triton" if bench.device.type == "cuda" else "auto"
    others = peers_of(operator, bench.device)
    calls, error = calls_of(what, name, operator, impl, others)
    rows, rounds = operators.measure(bench, benchmark, calls)
    settings = {"batch": batch, "context": length, "largest_error": error, **rounds}
    record = bench.record(f"fused-{what}", case, settings, rows)
    assert records.measured(record)
