"""Inputs and error budgets shared by the tests and the benchmarks of every operator."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import reference

REGIMES = ("random", "strong", "weak", "mixed", "spike", "reset")
"""Gate regimes, with log-decays: ordinary; -20 per token; -6e-6 per token; runs of both; -1e4 every
40 tokens; erased states."""


@dataclasses.dataclass(frozen=True)
class DdtsCase:
    """One shape of DDTS and the regime of its gates.

    Attributes:
        batch, length, heads, key_dim, value_dim: B, T, H, K, V.
        regime: one of ``REGIMES``.
        states: give an initial state and ask for the final one.
        documents: lengths of packed documents, empty ones allowed; requires ``batch == 1``.
        dtype: that of q, k, v and do; log_decay and states are float32 (float64 with float64).
    """

    batch: int = 1
    length: int = 64
    heads: int = 1
    key_dim: int = 16
    value_dim: int = 16
    regime: str = "random"
    states: bool = True
    documents: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shape = f"B{self.batch}T{self.length}H{self.heads}K{self.key_dim}V{self.value_dim}"
        packed = "" if self.documents is None else f"-{len(self.documents)}docs"
        states = "-states" if self.states else ""
        dtype = "" if self.dtype == torch.float32 else "-" + str(self.dtype).removeprefix("torch.")
        return f"{shape}-{self.regime}{packed}{states}{dtype}"


class DdtsInputs(NamedTuple):
    """Inputs of a run of DDTS, in the dtypes of its case; ``None`` for those the case lacks."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor
    initial_state: torch.Tensor | None
    do: torch.Tensor
    dfinal_state: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


def gate_preactivations(regime: str, shape: tuple[int, ...], generator: torch.Generator):
    """Pre-activations ``(select, temper)`` of :func:`rodimus_kernels.ddts_gates`, ``[B, T, H,
    K]`` float64, that put the gates in a regime."""
    select, temper = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "ab")
    time = torch.arange(shape[1])[None, :, None, None]
    strong, weak = (select + 20, temper + 30), (select - 12, temper)
    if regime == "strong":
        return strong
    if regime == "weak":
        return weak
    if regime == "mixed":
        runs = time // 7 % 2 == 0
        return tuple(torch.where(runs, a, b) for a, b in zip(strong, weak, strict=True))
    if regime == "spike":
        spikes = time % 40 == 17
        return torch.where(spikes, select + 1e4, select - 6), torch.where(spikes, strong[1], temper)
    if regime in ("random", "reset"):
        return select, temper
    raise ValueError(f"regime must be one of {REGIMES}, got {regime!r}")


def ddts_inputs(case: DdtsCase, *, seed: int = 0, device: torch.device | str = "cpu") -> DdtsInputs:
    """Random inputs of a case, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    keys = (case.batch, case.length, case.heads, case.key_dim)
    values = (case.batch, case.length, case.heads, case.value_dim)
    k, log_decay = reference.ddts_gates(
        draw(*keys), *gate_preactivations(case.regime, keys, generator)
    )
    if case.regime == "spike":
        k = k.clamp(-30, 30)
    if case.regime == "reset":
        log_decay[:, [t for t in (0, 13, 64, 100) if t < case.length]] = reference.RESET
    sequences = case.batch if case.documents is None else len(case.documents)
    state_shape = (sequences, case.heads, case.key_dim, case.value_dim)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    half = lambda x: x.to(device, case.dtype)
    bounds = None
    if case.documents is not None:
        ends = torch.tensor((0, *case.documents)).cumsum(0)
        bounds = ends.to(device, torch.int32)
    return DdtsInputs(
        q=half(draw(*keys)),
        k=half(k),
        v=half(draw(*values)),
        log_decay=log_decay.to(device, wide),
        initial_state=(0.3 * draw(*state_shape)).to(device, wide) if case.states else None,
        do=half(draw(*values)),
        dfinal_state=(0.1 * draw(*state_shape)).to(device, wide) if case.states else None,
        cu_seqlens=bounds,
    )


def run_ddts(
    function: Callable, inputs: DdtsInputs, *, dtype: torch.dtype | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """Outputs and every gradient of one run, by name.

    Args:
        function: ``ddts`` or a function with its signature.
        inputs: as :func:`ddts_inputs` makes them.
        dtype: convert the tensors first; float64 gives the truth.
        options: passed on, for instance ``impl``.
    """
    convert = lambda x: None if x is None else x.detach().to(dtype or x.dtype)
    leaf = lambda x: None if x is None else convert(x).requires_grad_()
    names = ("q", "k", "v", "log_decay", "initial_state")
    leaves = {name: leaf(getattr(inputs, name)) for name in names}
    o, final_state = function(
        *(leaves[name] for name in names[:4]),
        initial_state=leaves["initial_state"],
        output_final_state=inputs.dfinal_state is not None,
        cu_seqlens=inputs.cu_seqlens,
        **options,
    )
    outputs, seeds = {"o": o}, [convert(inputs.do)]
    if inputs.dfinal_state is not None:
        outputs["final_state"] = final_state
        seeds.append(convert(inputs.dfinal_state))
    torch.autograd.backward(list(outputs.values()), seeds)
    gradients = {f"d{name}": x.grad for name, x in leaves.items() if x is not None}
    return {name: x.detach() for name, x in {**outputs, **gradients}.items()}


def _difference(actual, exact):
    """``actual - exact`` in float64; different shapes that would broadcast are refused."""
    if actual.shape != exact.shape:
        raise ValueError(f"expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    return actual.double() - exact.double()


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """``|actual - exact| / |exact|`` in the Frobenius norm; where the truth is zero, the norm of
    the error itself. NaN stays NaN.

    Raises:
        ValueError: the shapes differ.
    """
    norm = exact.double().norm()
    return (_difference(actual, exact).norm() / (norm if norm > 0 else 1.0)).item()


def assert_close(
    actual: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], limit: float
) -> float:
    """Assert a relative error within ``limit`` for each of ``exact``; the message lists all errors.

    Returns:
        The largest error.

    Raises:
        AssertionError: an error is larger.
        ValueError: the shapes differ.
    """
    errors = {name: relative_error(actual[name], exact[name]) for name in exact}
    table = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    assert all(error <= limit for error in errors.values()), f"limit {limit:.1e}, got {table}"
    return max(errors.values())


def assert_within_budget(
    name: str,
    actual: torch.Tensor,
    exact: torch.Tensor,
    baseline: torch.Tensor,
    *,
    factor: float = 2.0,
) -> None:
    """Assert that the largest and the rms error are within ``factor`` times the baseline's.

    Args:
        name: for the message.
        actual: the implementation's result.
        exact: the float64 truth.
        baseline: the reference's result when it computes in the dtype of the inputs.
        factor: how many times the baseline's error is still accepted.

    Raises:
        AssertionError: an error is larger.
        ValueError: the shapes differ.
    """
    measure = lambda error: (error.abs().max().item(), error.square().mean().sqrt().item())
    (worst, rms), (worst_allowed, rms_allowed) = (
        measure(_difference(x, exact)) for x in (actual, baseline)
    )
    # one unit of float32 rounding at the size of the answer, in case the baseline is exact
    slack = torch.finfo(torch.float32).eps * exact.double().abs().max().item()
    assert worst <= factor * worst_allowed + slack and rms <= factor * rms_allowed + slack, (
        f"{name}: largest error {worst:.2e}, rms {rms:.2e};"
        f" baseline {worst_allowed:.2e}, rms {rms_allowed:.2e}; allowed {factor}x"
    )
