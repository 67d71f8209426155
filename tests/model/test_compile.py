"""``torch.compile(fullgraph=True)``: one graph, no break, no recompilation a token."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from rodimus.modeling_rodimus import CACHE_NAME
from tests.device import ON_BOTH, here
from tests.model.golden_data import BLOCK_TYPES, golden_config, relative_max_error
from tests.model.helpers import build, others_slow, random_ids
from tests.model.test_ways_of_running import take_gradients, worst_gradient
from tests.model.ways import BOUND, full, in_pieces

pytestmark = ON_BOTH

TABLE = "compiled, against eager (max |a - b| / max |b|)"


@pytest.fixture(params=others_slow("rodimus_plus", BLOCK_TYPES))
def kind(request) -> str:
    return request.param


@pytest.fixture
def model(kind):
    """One layer: what is compiled again and again is the same for more."""
    return build(golden_config(kind) | {"n_layer": 1})


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function, backend="eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_forward_of_any_length_is_one_graph(model, kind, measure, device):
    """After the second length the graph is dynamic: later ones compile nothing. On a GPU up to 64
    tokens, one chunk, are the work of other kernels, so of another graph."""
    first, later = (40, 33), (70, 12, 129)
    if device.type == "cuda":
        first, later = (140, 133), (170, 112, 229)
    run = compiled(model)
    with torch.no_grad():
        for length in first:
            run(random_ids(2, length), use_cache=False)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in later:
                ids = random_ids(2, length)
                error = relative_max_error(run(ids, use_cache=False).logits, full(model, ids))
                measure(TABLE, "forward, dynamic length", kind, error, BOUND)
    assert graphs() == 2


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_training_step(model, kind, packed, measure):
    """Forward and backward; packed by position_ids, which no host ever reads."""
    ids = random_ids(2, 24)
    options = {"labels": ids, "use_cache": False}
    if packed:
        options["position_ids"] = here(torch.stack([torch.arange(24) % n for n in (10, 7)]))
    model.train()
    model(ids, **options).loss.backward()
    expected = take_gradients(model)
    compiled(model, "aot_eager")(ids, **options).loss.backward()
    assert graphs() == 1
    error = worst_gradient(take_gradients(model), expected)
    measure(TABLE, f"training step{' packed' if packed else ''}, gradients", kind, error, BOUND)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 cannot record how a cache is made"
)
def test_positions_return_a_cache_where_rows_are_said_to_be_unpacked(model):
    """A recording cannot look at positions, and takes them for those of packed rows."""
    ids = random_ids(2, 12)
    positions = here(torch.arange(12)[None])
    run = compiled(model)
    with torch.no_grad():
        taken_as_packed = run(ids, position_ids=positions, use_cache=True)
        unpacked = run(ids, position_ids=positions, use_cache=True, is_packed=False)
    assert CACHE_NAME not in taken_as_packed
    assert int(unpacked[CACHE_NAME].get_seq_length()) == 12
    for out in (taken_as_packed, unpacked):
        assert relative_max_error(out.logits, full(model, ids)) < BOUND


def decode_compiled(model, ids, prompt, backend="eager"):
    """Logits of a prompt prefilled in eager, then of compiled steps."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    logits = [in_pieces(model, ids[:, :prompt], [prompt], cache=cache)]
    step = compiled(model, backend=backend)
    with torch.no_grad():
        for token in ids[:, prompt:].T:
            out = step(token[:, None].clone(), past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("prompt", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_static_decode_step(model, kind, prompt, measure):
    """Through and past the window, from a prompt within it and one beyond it: one graph, for the
    cache counts on the device."""
    ids = random_ids(2, 40)
    logits = decode_compiled(model, ids, prompt)
    assert graphs() == 1
    measure(TABLE, "static decode step", kind, relative_max_error(logits, full(model, ids)), BOUND)


FIRST_CALL = """
import torch
from rodimus import RodimusConfig, RodimusForCausalLM
attn = {"num_heads": 2, "num_heads_v": 2, "window_size": 8}
config = RodimusConfig("rodimus_plus", 32, 1, 20, mixer_cfg={"mem_size": 8}, attn_cfg=attn)
model = RodimusForCausalLM(config).to(device)
ids = torch.arange(12, device=device)[None]
compiled = torch.compile(model, backend="eager", fullgraph=True)
"""
FIRST_STEP = """
from transformers import StaticCache
cache = StaticCache(config=model.config, max_cache_len=16)
with torch.no_grad():
    model(ids, past_key_values=cache)
    compiled(ids[:, :1], past_key_values=cache)
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["compiled(ids, labels=ids).loss.backward()", FIRST_STEP])
def test_first_call_of_a_process_is_compiled(call, device):
    """Nothing is imported while tracing: a fresh process needs no eager call before."""
    command = [sys.executable, "-c", f"device = {device.type!r}\n{FIRST_CALL}{call}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_inductor(model, kind, measure):
    """The default backend, once: training step and static decoding."""
    ids = random_ids(2, 24)
    logits = decode_compiled(model, ids, 12, "inductor")
    measure(
        TABLE, "decode step, inductor", kind, relative_max_error(logits, full(model, ids)), BOUND
    )
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = take_gradients(model)
    compiled(model, backend="inductor")(ids, labels=ids, use_cache=False).loss.backward()
    error = worst_gradient(take_gradients(model), expected)
    measure(TABLE, "training step, inductor, gradients", kind, error, 2 * BOUND)
