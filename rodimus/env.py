"""``rodimus env``: what is installed, and which implementation each operator uses here, and why.

The implementations are observed, not predicted: every operator runs once on a small input.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

import rodimus_kernels

from . import __version__

REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
# Distribution: what it gives.
OPTIONAL = {
    "triton": "GPU kernels",
    "matplotlib": "the loss curve as a picture",
    "rich": "the progress display of training",
}


def run(options: argparse.Namespace | None = None) -> None:
    """The command ``rodimus env``."""
    for line in report():
        print(line)


def report() -> Iterator[str]:
    """The whole report, line by line."""
    yield f"rodimus        {__version__} ({os.path.dirname(__file__)})"
    yield f"python         {platform.python_version()}, {platform.platform()}"
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
    yield f"operators on {device.type}: the module that works [what impl= accepts, or why not]"
    for name, (operator, arguments) in cases(device).items():
        call = lambda impl, operator=operator, arguments=arguments: operator(*arguments, impl=impl)
        line = f"  {name:<26} {observe(lambda call=call: call('auto')):<22}"
        others = "; ".join(_others(operator, call))
        yield line + (f" [{others}]" if others else "")


def cases(device: torch.device) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Each public operator with a small input for it: ``{label: (operator, arguments)}``."""
    ops, (B, T, H, K, V) = rodimus_kernels, (1, 64, 1, 16, 32)

    def zeros(*shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    qk, v, one, weight = zeros(B, T, H, K), zeros(B, T, H, V), zeros(B, H, K), zeros(V)
    rows, ring, taps = zeros(B, T, V), zeros(B, T, K + V), zeros(V, 4)
    position, labels = zeros(B, dtype=torch.int64), zeros(T, dtype=torch.int64)
    return {
        "ddts_gates": (ops.ddts_gates, (qk, qk, qk)),
        f"ddts ({T} tokens)": (ops.ddts, (qk, qk, v, qk)),
        "ddts_step": (ops.ddts_step, (one, one, zeros(B, H, V), one, zeros(B, H, K, V))),
        "shared_key_attention": (_windowed(ops.shared_key_attention), (qk, qk, v)),
        "shared_key_attention_step": (
            _windowed(ops.shared_key_attention_step),
            (one[:, None], one[:, None], zeros(B, 1, H, V), ring, position),
        ),
        "short_conv": (ops.short_conv, (rows, taps)),
        "short_conv_step": (ops.short_conv_step, (rows[:, 0], zeros(B, V, 4), taps)),
        "rms_norm": (ops.rms_norm, (rows, weight)),
        "add_rms_norm": (ops.add_rms_norm, (rows, rows, weight)),
        "gated_rms_norm": (ops.gated_rms_norm, (rows, rows, weight)),
        "linear_cross_entropy": (ops.linear_cross_entropy, (rows[0], zeros(8, V), labels)),
    }


def _windowed(operator: Callable) -> Callable:
    def call(*arguments, impl):
        return operator(*arguments, window_size=16, impl=impl)

    call.__module__ = operator.__module__
    return call


def observe(call: Callable[[], Any]) -> str:
    """Where an operator's work is done: the first function of the package after its checks."""
    names: list[str] = []

    def note(frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("rodimus_kernels."):
            name = module.removeprefix("rodimus_kernels.")
            names.append(f"{name}.{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        call()
    except (ImportError, RuntimeError, ValueError) as error:
        return f"fails: {str(error).splitlines()[0]}"
    finally:
        sys.setprofile(None)
    checks = [i for i, name in enumerate(names) if name.startswith("_dispatch.")]
    after = names[checks[-1] + 1 if checks else 1 :]
    return after[0].rpartition(".")[0] if after else "torch"


def _others(operator: Callable, call: Callable[[str], Any]) -> Iterator[str]:
    """What an explicit ``impl=`` would do, for each that the operator knows."""
    module = inspect.getmodule(operator) or importlib.import_module(operator.__module__)
    for impl in getattr(module, "IMPLS", ()):
        try:
            call(impl)
            yield impl
        except ImportError as error:
            yield f"{impl}: {str(error).splitlines()[0]}"
        except (RuntimeError, ValueError):
            # not one of this operator's, or not for this device: explicit choices never fall back
            continue


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["env", *sys.argv[1:]]))
