"""The machine a record comes from: hardware, versions, commit, ceilings and disturbances."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rodimus_kernels import native

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMIT_VARIABLE = "RODIMUS_BENCH_COMMIT"
PACKAGES = ("torch", "triton", "transformers", "flash-linear-attention", "flash-attn", "rwkv")
PACKAGES += ("llama-cpp-python", "torchao")

SYSTEM_TIMES = Path("/proc/stat")
CPU_FACTS = Path("/proc/cpuinfo")

BUSY = 0.05
"""Share of the cores that other programs may keep busy without a warning."""

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Instruction sets that decide how fast products are: a virtual machine may hide the CPU model."""

WHERE = ("name", "instructions", "threads", "versions", "commit", "dirty")
"""Fields of a machine's description that all results in one record have in common."""


def device() -> torch.device:
    """The GPU that torch sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """The description of this machine for a record; no host or user names."""
    about: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **installed(PACKAGES)},
    }
    if device.type == "cuda":
        about |= {"cuda": torch.version.cuda, **gpu_state(device)}
    return about | commit()


def are_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two descriptions have the same machine, versions and code, to share a record."""
    return all(a.get(name) == b.get(name) for name in WHERE)


def told(about: Mapping[str, Any]) -> str:
    """A described machine in words: ``AMD EPYC (avx2)``, as far as its record says."""
    found = about.get("instructions") if about["name"] == about.get("cpu") else None
    return f"{about['name']} ({found})" if found else about["name"]


def cpu_name() -> str:
    """The processor's model, from the system."""
    return _of_cpu("model name") or platform.processor() or platform.machine()


def instructions() -> str:
    """Those of ``INSTRUCTIONS`` that the processor has, from the system."""
    flags = (_of_cpu("flags") or _of_cpu("Features")).split()
    return " ".join(name for name in INSTRUCTIONS if name in flags)


def _of_cpu(field: str) -> str:
    """A field of the first processor from the system; empty if it is not there."""
    try:
        text = CPU_FACTS.read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def folder_name(name: str) -> str:
    """A machine's name as a folder: ``NVIDIA H200`` is ``NVIDIA_H200``, as in ``make gpu``."""
    return re.sub(r"[ /]", "_", name)


def installed(distributions: tuple[str, ...]) -> dict[str, str | None]:
    """Version of each distribution, None if it is not installed."""
    found: dict[str, str | None] = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpu_state(device: torch.device) -> dict[str, str]:
    """Driver, clocks, temperature and throttling of a GPU, as the driver's tool reports them. The
    tool also lists GPUs that torch may not see."""
    fields = {
        "uuid": "uuid",
        "driver": "driver_version",
        "sm_clock": "clocks.sm",
        "memory_clock": "clocks.mem",
        "temperature": "temperature.gpu",
        "power_limit": "power.limit",
        "throttle": "clocks_throttle_reasons.active",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    listed = [
        dict(zip(fields, map(str.strip, line.split(",")), strict=False))
        for line in _output(command).splitlines()
    ]
    uuids = [found.pop("uuid") for found in listed]
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    if uuid in uuids:
        return listed[uuids.index(uuid)]
    return listed[0] if len(listed) == 1 else {}


def commit() -> dict[str, Any]:
    """Commit of the checkout, and whether its files (except records and reports) differ from it: a
    hash of the differences, or False.

    The variable ``RODIMUS_BENCH_COMMIT`` takes precedence, for a copy without its git folder.
    """
    told = os.environ.get(COMMIT_VARIABLE)
    head = told or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    if told or not head:
        return {"commit": head or "unknown", "dirty": None}
    # the run before this one may have written records
    own = [f":!benchmarks/{name}" for name in ("results", "plots", "RESULTS.md")]
    changes = _output(["git", "-C", str(ROOT), "diff", "HEAD", "--", ".", *own])
    return {
        "commit": head,
        "dirty": bool(changes) and hashlib.sha256(changes.encode()).hexdigest()[:12],
    }


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    # a diff may contain any bytes
    return run.stdout.decode(errors="backslashreplace").strip()


def disturbances(before: float, during: float = 0.0) -> list[str]:
    """Reasons to distrust timings taken now, in words; empty on a quiet machine.

    Args:
        before, during: Cores that other programs kept busy, before and during the benchmark.
    """
    found = []
    cores = os.cpu_count() or 1
    where = device()
    if (problem := native.problem(where.type)) is not None:
        found.append(f"our models run without native operators: {problem}")
    for load, when in ((before, "before the start"), (during, "beside the benchmark")):
        if load > BUSY * cores:
            found.append(f"machine busy: other programs took {load:.1f} of {cores} cores {when}")
    for supply in Path("/sys/class/power_supply").glob("*/online"):
        if supply.read_text(encoding="utf-8").strip() == "0":
            found.append("running on battery: the power supply is not connected")
    throttle = gpu_state(where).get("throttle", "") if where.type == "cuda" else ""
    # bit 0 is an idle GPU, bit 1 a clock that an application asked for
    if throttle.startswith("0x") and int(throttle, 16) & ~0b11:
        found.append(f"the GPU reports reduced clocks, reasons {throttle}")
    return found


def ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> dict[str, float]:
    """Rates that memory and matrix units of this machine reach now, in torch's own operations.

    Args:
        device: Where to measure.
        dtype: Of the matrix products.
        quick: Sizes for a smoke run; the numbers then mean nothing.

    Returns:
        ``copy_GBps`` (bytes read plus bytes written), ``read_GBps`` (a sum), ``gemv_GBps`` (bytes
        of the weight per second in a product with one row) and ``gemm_TFLOPs`` (a large product).
    """
    width = 128 if quick else 8192 if device.type == "cuda" else 2048
    rates = _memory_rates(device, read_elements(device, quick=quick))
    return rates | _product_rates(device, dtype, width, 2 if quick else 8)


def read_elements(device: torch.device, *, quick: bool = False) -> int:
    """Count of float32 numbers to read for the memory rate: far more than a cache holds."""
    return 2**20 if quick else 2**30 if device.type == "cuda" else 2**26


def _memory_rates(device: torch.device, elements: int) -> dict[str, float]:
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    copy = _seconds(lambda: target.copy_(source), device)
    read = _seconds(lambda: source.sum(), device)
    return {"copy_GBps": 8 * elements / copy / 1e9, "read_GBps": 4 * elements / read / 1e9}


def _product_rates(
    device: torch.device, dtype: torch.dtype, width: int, count: int
) -> dict[str, float]:
    """``count`` weights take turns in the product with one row: together they exceed the cache."""
    weights = [torch.randn(4 * width, width, device=device).to(dtype) for _ in range(count)]
    row, rows = (torch.randn(n, width, device=device).to(dtype) for n in (1, width))
    linear = torch.nn.functional.linear
    gemv = _seconds(lambda: [linear(row, weight) for weight in weights], device) / count
    gemm = _seconds(lambda: linear(rows, weights[0]), device)
    products = 4 * width * width
    return {
        "gemv_GBps": products * weights[0].element_size() / gemv / 1e9,
        "gemm_TFLOPs": 2 * width * products / gemm / 1e12,
    }


def _seconds(call: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Median wall time of a call, warmed up and synchronised."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times = []
    for _ in range(rounds + 2):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def memory_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on the device, bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])


class Others:
    """Measures the cores that programs other than this one and its ended children keep busy."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from now on."""
        self._since = time.monotonic(), _seconds_of_others()

    def cores(self) -> float:
        """Cores that they kept busy since the start, including what the host took from a virtual
        machine; 0.0 if the system does not say."""
        since, before = self._since
        seconds = max(time.monotonic() - since, 1e-9)
        return max((_seconds_of_others() - before) / seconds, 0.0)


def _seconds_of_others() -> float:
    try:
        line = SYSTEM_TIMES.read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, stolen = map(int, line.split()[1:9])
    everyone = (user + nice + system + irq + softirq + stolen) / os.sysconf("SC_CLK_TCK")
    return everyone - sum(os.times()[:4])


def load_now(seconds: float = 0.5) -> float:
    """Cores that other programs keep busy during a moment in which this one sleeps."""
    others = Others()
    time.sleep(seconds)
    return others.cores()
