"""``rodimus env``: what is installed, and which implementation each operator uses here, and why.

The implementations are observed, not predicted: every operator runs once on a small input.
"""

import argparse
import importlib.metadata
import inspect
import itertools
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from functools import partial

import torch

import rodimus_kernels

from . import __version__
from .errors import first_line

REQUIRED = ("transformers", "tokenizers", "safetensors", "numpy")
# Distribution: what it provides.
OPTIONAL = {
    "triton": "GPU kernels",
    "flash-attn": "shared_key_attention(impl='flash') on a GPU",
    "flash-attn-4": "the same on Hopper and Blackwell",
    "uvicorn": "rodimus serve, with starlette",
    "matplotlib": "the loss curve as a picture",
    "rich": "the progress display of training",
    "torchao": "weights in 8 and 4 bits, rodimus generate --weight-dtype int8",
    "lm_eval": "rodimus eval --tasks",
}


def run(options: argparse.Namespace | None = None) -> None:
    """The command ``rodimus env``."""
    operators = logging.getLogger("rodimus_kernels")
    level = operators.level
    # the report says what the operators would warn about
    operators.setLevel(logging.ERROR)
    try:
        for line in report():
            print(line)
    finally:
        operators.setLevel(level)


def report() -> Iterator[str]:
    """The whole report, line by line."""
    yield f"rodimus        {__version__} ({os.path.dirname(__file__)})"
    yield f"python         {platform.python_version()}, {platform.platform()}"
    yield f"torch          {torch.__version__}"  # with its CUDA version, unlike the distribution's
    for name in REQUIRED:
        yield f"{name:<14} {_version(name) or 'MISSING'}"
    for name, gives in OPTIONAL.items():
        yield f"{name:<14} {_version(name) or f'not installed; it gives {gives}'}"
    yield ""
    yield from _devices()
    yield ""
    yield from _operators()
    if _version("flash-linear-attention"):
        yield ""
        yield (
            "note: flash-linear-attention is installed and registers the same model type. Import"
            " rodimus after it, or call rodimus.register()."
        )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    yield f"cpu            {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "torch sees none" if built else "this torch is built for the CPU alone"
        yield f"gpu            none: {why}"
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        capability = f"{device.major}.{device.minor}"
        yield f"cuda:{index}         {device.name}, {memory:.0f} GiB, capability {capability}"
    yield f"cuda           {torch.version.cuda}"


def _operators() -> Iterator[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"operators on {device.type}: the module that works [what impl= accepts]"
    calls = cases(device)
    # a module's IMPLS are those of its main operator; its other operators may have more
    names = [getattr(inspect.getmodule(call.func), "IMPLS", ()) for call in calls.values()]
    known = tuple(dict.fromkeys(itertools.chain(*names)))
    missing: dict[str, str] = {}
    for label, call in calls.items():
        others = ", ".join(_others(call, known, missing))
        yield f"  {label:<26} {observe(call):<33} [{others}]"
    for impl, reason in missing.items():
        yield f"  no {impl}: {reason}"


def cases(device: torch.device) -> dict[str, partial]:
    """Each public operator with small inputs bound; only ``impl=`` is left to pass."""
    ops, (B, T, H, K, V, W) = rodimus_kernels, (1, 64, 1, 16, 32, 4)

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    qk, v, rows = zeros(B, T, H, K), zeros(B, T, H, V), zeros(B, T, V)
    one, row, weight = zeros(B, K), zeros(B, V), zeros(V)
    state, taps = zeros(B, H, K, V), zeros(V, W)
    position, labels = zeros(B, dtype=torch.int64), zeros(T, dtype=torch.int64)
    mixer = {"gate_weight": zeros(V, K), "gate_bias": weight}
    mixer |= {"residual_weight": weight, "norm_weight": weight}
    keys, gates = zeros(2 * K, V), zeros(2 * K)
    block = ops.BlockWeights(
        mixer_norm=one[0],
        fc=zeros(2 * V, K),
        conv=taps,
        conv_bias=weight,
        query_key=keys,
        gate_in=keys,
        gate_out=zeros(V, 2 * K),
        gate_bias=weight,
        mem_gate=keys,
        mem_gate_bias=gates,
        residual_weight=weight,
        act_norm=weight,
        mixer_out=zeros(K, V),
    )
    calls = [
        partial(ops.ddts_gates, qk, qk, qk),
        partial(ops.ddts, qk, qk, v, qk),
        partial(ops.gated_ddts, qk, qk, v, qk, qk),
        partial(ops.ddts_summary, qk, v, qk),
        partial(ops.ddts_scan, state[None], state[None, ..., 0]),
        partial(ops.ddts_step, one[:, None], one[:, None], row[:, None], one[:, None], state),
        partial(ops.ddts_mixer_step, one, one, one, one, one, row, row, row, state, **mixer),
        partial(ops.blocks_step, one, [block], [zeros(B, V, W)], [state]),
        partial(ops.shared_key_attention, qk, qk, v, window_size=K),
        partial(
            ops.shared_key_attention_step,
            qk[:, :1],
            qk[:, :1],
            v[:, :1],
            zeros(B, T, K + V),
            position,
            window_size=K,
        ),
        partial(ops.rope, qk, qk[:, :, 0, : K // 2], qk[:, :, 0, : K // 2]),
        partial(ops.short_conv, rows, taps),
        partial(ops.short_conv_step, row, zeros(B, V, W), taps),
        partial(ops.rms_norm, rows, weight),
        partial(ops.add_rms_norm, rows, rows, weight),
        partial(ops.gated_rms_norm, rows, rows, weight),
        partial(ops.input_gate, rows, zeros(B, T, K), zeros(V, K), weight),
        partial(ops.swiglu, rows),
        partial(ops.linear, row, zeros(K, V)),
        partial(ops.linear_cross_entropy, rows[0], zeros(8, V), labels),
    ]
    return {call.func.__name__: call for call in calls}


def observe(call: partial) -> str:
    """The module that does an operator's work, or several if its own module combines others."""
    try:
        used = rodimus_kernels.implementations_used(call)
    except Exception as error:  # the report is there to show what a compiler or driver says
        return f"fails: {first_line(error)}"
    own = call.func.__module__
    modules = [name.partition(":")[0] for name in used] or [own]
    if modules[0] != own:
        modules = modules[:1]
    others = [name for name in dict.fromkeys(modules) if name != own]
    return ", ".join(name.removeprefix("rodimus_kernels.") for name in others or [own])


def _others(call: partial, known: tuple[str, ...], missing: dict[str, str]) -> Iterator[str]:
    """The known ``impl=`` that the operator has; ``missing`` gets the reason if one fails."""
    # without impl= there is nothing to choose
    chooses = "impl" in inspect.signature(call.func).parameters
    for impl in known if chooses else ():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(impl=impl)
            yield impl
        except ImportError as error:
            yield f"no {impl}"
            missing.setdefault(impl, first_line(error).partition(": ")[2])
        except (RuntimeError, ValueError):
            # the operator or the device lacks it: explicit choices never fall back
            continue
        except Exception as error:  # as in observe
            yield f"{impl} fails"
            missing.setdefault(impl, f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["env", *sys.argv[1:]]))
