"""The points of the decoding benchmark, from arithmetic."""

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
