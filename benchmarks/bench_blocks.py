"""One token through blocks of the 1.6B model with a full window, by device time: ten kernels per
block against one, and on a CPU the native implementation against plain torch.

Every block has its own weights, so that no cache holds what the last run has read. Before anything
is timed, each implementation is compared with the reference in float64.

    floor   weights and window once, states and taps twice, over the measured copy rate
"""

import copy
import functools
from itertools import chain

import torch

from rodimus import RodimusConfig, RodimusModel
from rodimus_kernels import BlockWeights, blocks_step, native
from rodimus_kernels.testing import relative_error

from . import operators, sizes

BLOCKS = 4
# batch, rows of the ring; the window is full
POINTS = {
    "tiny": [(1, 64)],
    "cpu": [],
    "cuda": [(batch, 2112) for batch in (1, 2, 4, 8)],
}
BUDGET = 2.0
"""Largest error against float64, as a multiple of the reference's error on the same inputs."""


class Blocks:
    """Blocks of random weights, with states, rings and inputs for one token of each sequence."""

    def __init__(self, batch: int, rows: int, scale: str, device: torch.device, dtype: torch.dtype):
        settings = sizes.config_of("rodimus_plus", scale)
        few = {"n_layer": BLOCKS, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
        config = RodimusConfig(**settings | few)
        with torch.device(device):
            layers = RodimusModel(config).to(dtype).eval().layers
            mixer, attn = layers[0].mixer.inner_mixer, layers[0].attn
            self.weights = [block.step_weights() for block in layers]
            inner, taps = self.weights[0].conv.shape
            keys, dim = self.weights[0].mem_gate.shape[0] // 2, attn.head_dim
            width = self.weights[0].key.shape[0] + self.weights[0].value.shape[0]
            make = lambda *shape: [torch.randn(batch, *shape) for _ in range(BLOCKS)]
            self.taps = [x.to(dtype) for x in make(inner, taps)]
            self.states = make(1, keys, inner)
            self.rings = [x.to(dtype) for x in make(rows, width)]
            self.stream = torch.randn(batch, config.d_model)
            self.position = torch.full((batch,), 3 * rows + 7)
            angles = torch.randn(batch, dim // 2)
            self.rotary = (angles.cos().to(dtype), angles.sin().to(dtype))
        window = min(config.sliding_window, rows)
        self.named = {"window_size": window, "head_dim": dim, "norm_eps": config.norm_epsilon}
        self.named["key_eps"] = mixer.normalize_epsilon
        self.floor_bytes = sum(x.nbytes for x in chain.from_iterable(self.weights) if x is not None)
        self.floor_bytes += 2 * sum(x.nbytes for x in (*self.states, *self.taps))
        self.floor_bytes += batch * window * sum(x[0, 0].nbytes for x in self.rings)

    def step(self, impl: str) -> torch.Tensor:
        """The stream after the last block; states are written in place."""
        states = (self.taps, self.states, self.rings, self.position, self.rotary)
        return blocks_step(self.stream, self.weights, *states, **self.named, impl=impl)

    def copied(self) -> "Blocks":
        """A copy with its own states, which shares the weights."""
        other = copy.copy(self)
        other.taps, other.states, other.rings = (
            [x.clone() for x in given] for given in (self.taps, self.states, self.rings)
        )
        return other

    def exact(self) -> "Blocks":
        """A copy in float64."""
        wide, convert = copy.copy(self), lambda x: None if x is None else x.double()
        wide.weights = [BlockWeights(*map(convert, block)) for block in self.weights]
        for name in ("taps", "states", "rings", "rotary"):
            setattr(wide, name, [convert(x) for x in getattr(self, name)])
        wide.stream = self.stream.double()
        return wide


def impls_of(device: torch.device) -> tuple[str, ...]:
    """The implementations to time, first the one that is chosen automatically."""
    if not native.is_available(device.type):
        return ("reference",)
    return ("native", "persistent" if device.type == "cuda" else "reference")


def test_blocks(bench, benchmark, start, point):
    batch, rows = point
    case = bench.case(batch, rows)
    start("blocks", case)
    blocks, error = Blocks(batch, rows, bench.scale, bench.device, bench.dtype), 0.0
    exact = blocks.exact().step("reference")
    limit = BUDGET * relative_error(blocks.copied().step("reference"), exact)
    calls: dict[str, operators.Call | str] = {}
    for impl in impls_of(bench.device):
        try:
            found = blocks.copied().step(impl)
        except (RuntimeError, ValueError) as reason:
            # persistent needs bfloat16 and a large GPU; the automatic choice must run
            if not calls:
                raise
            calls[f"blocks/{impl}"] = str(reason).splitlines()[0]
            continue
        error = max(error, relative_error(found, exact))
        assert error <= limit, f"{impl}: relative error {error:.1e}, expected {limit:.1e} at most"
        run = functools.partial(blocks.step, impl)
        calls[f"blocks/{impl}"] = operators.Call(run, blocks.floor_bytes // BLOCKS, BLOCKS)
    rows, rounds = operators.measure(bench, benchmark, calls)
    settings = {"batch": batch, "context": rows, "blocks": BLOCKS, "largest_error": error}
    settings |= rounds
    bench.record("blocks", case, settings, rows)
