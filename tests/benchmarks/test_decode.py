"""The points of the decoding benchmark, from arithmetic."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_decode, harness, peers, sizes
from rodimus import RodimusConfig
from rodimus.generation.state import StateLayout

LAYERS, VALUE_DIM, ROW = 24, 4096, 17 * 128
GPU_BYTES = 139 * 2**30


def test_the_largest_batch_has_a_full_window_and_fits_beside_its_baselines():
    batch, context = point = bench_decode.POINTS["cuda"][-1]
    assert batch == max(n for n, _ in bench_decode.POINTS["cuda"]) == 256
    assert bench_decode.LAST[-1] == point, "the dearest point comes last"
    config = RodimusConfig(**sizes.config_of("rodimus_plus", "full"))
    assert context >= config.sliding_window
    recurrent = LAYERS * VALUE_DIM * (4 * 64 + 2 * 4)
    state = sizes.state_bytes("rodimus_plus", sizes.config_of("rodimus_plus", "full"), *point, 2)
    assert state == (batch * recurrent, batch * LAYERS * 2048 * ROW * 2)
    # the engine keeps whole tiles of the window: 33 of 64 rows
    slot = StateLayout.of(config, torch.bfloat16).bytes()
    assert sum(slot.values()) == recurrent + LAYERS * 2112 * ROW * 2
    others = ("qwen2", "rwkv6", "rodimus")
    held = sum(sizes.state_bytes(x, sizes.config_of(x, "full"), *point, 2).total for x in others)
    # every model of the catalogue is loaded, and transformers copies a layer's keys and values to
    # all 12 heads
    weights, copies = len(peers.CATALOGUE) * 3.3e9, 2 * batch * context * 12 * 128 * 2
    needed = batch * sum(slot.values()) + held + weights + copies
    assert needed + harness.MARGIN_BYTES < GPU_BYTES


ALL = {
    "qwen2-1.5b": ("dynamic", "static", "graph", "prefix"),
    "rwkv6-1.6b": ("own", "graph"),
    "rodimus-plus-1.6b": ("dynamic", "static", "graph", "engine"),
    "mamba2-like-1.5b": ("torch",),
}


def engines(name, batch, context, failed=()):
    """Those that take part on a GPU, after some have failed."""
    checked = {f"{name}/{engine}": peers.Unavailable("failed") for engine in failed}
    bench = SimpleNamespace(weight_dtype=None, device=torch.device("cuda"), checked=checked)
    model = SimpleNamespace(name=name, engines=ALL[name])
    return bench_decode.engines_of(bench, model, batch, context)


def test_every_engine_is_timed_in_one_case_of_a_gpu():
    assert all(engines(name, 1, 4096) == found for name, found in ALL.items())


@pytest.mark.parametrize(
    ("name", "batch", "context", "failed", "expected"),
    [
        ("qwen2-1.5b", 1, 1024, (), ("graph", "prefix")),
        ("qwen2-1.5b", 8, 32768, (), ("graph", "prefix")),
        # two caches of 30 GB would not fit
        ("qwen2-1.5b", 256, 4096, (), ("prefix",)),
        ("qwen2-1.5b", 256, 4096, ("prefix",), ("graph",)),
        ("qwen2-1.5b", 64, 1024, ("graph", "prefix"), ("graph", "prefix")),
        ("rwkv6-1.6b", 8, 4096, (), ("graph",)),
        ("rodimus-plus-1.6b", 1, 1024, (), ("engine",)),
        ("mamba2-like-1.5b", 1, 1024, (), ("torch",)),
    ],
)
def test_a_peer_is_timed_in_every_engine_that_works(name, batch, context, failed, expected):
    assert engines(name, batch, context, failed) == expected


def test_the_caches_of_a_peers_engines_fit_beside_each_other():
    sizes_of = [n * t for n, t in bench_decode.POINTS["cuda"] if n * t <= bench_decode.SIDE_BY_SIDE]
    qwen2 = sizes.config_of("qwen2", "full")
    assert sizes.state_bytes("qwen2", qwen2, 1, max(sizes_of), 2).total < 8e9
