"""What only a GPU does with a model: steps in a static cache, recorded once and replayed."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

from rodimus import modeling_rodimus
from tests.device import ON_GPU
from tests.model.golden_data import BLOCK_TYPES, relative_max_error
from tests.model.helpers import golden_model, random_ids
from tests.model.test_cache import generate, greedy_by_full_forward
from tests.model.ways import BOUND, TABLE, full, in_pieces

pytestmark = ON_GPU


@pytest.mark.parametrize("native", [True, False], ids=["fused", "modules"])
@torch.no_grad()
def test_a_recorded_step_goes_on_from_what_was_read(model, kind, native, measure, monkeypatch):
    """Through the window and past it, without a word from the host."""
    if not native:
        monkeypatch.setattr(modeling_rodimus, "blocks_step", None)
    ids = random_ids(2, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    logits, token = [in_pieces(model, ids[:, :6], [6], cache=cache)], ids[:, 6:7].clone()
    step = lambda: model(token, past_key_values=cache, use_cache=True).logits
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # the first steps load libraries and compile kernels
        for t in (6, 7):
            token.copy_(ids[:, t : t + 1])
            logits.append(step())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    for t in range(8, 40):
        token.copy_(ids[:, t : t + 1])
        graph.replay()
        logits.append(out.clone())
    error = relative_max_error(torch.cat(logits, 1), full(model, ids))
    measure(TABLE, f"recorded steps, {'fused' if native else 'modules'}", kind, error, BOUND)


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_generate_compiles_and_records_the_steps_of_a_static_cache(block_type, measure):
    """As transformers does by itself on a GPU: one graph, replayed for every token."""
    torch._dynamo.reset()
    counters.clear()
    model, ids = golden_model(block_type), random_ids(1, 20)
    options = {"cache_implementation": "static", "disable_compile": False}
    tokens, logits = generate(model, ids, **options)
    expected_tokens, expected = greedy_by_full_forward(model, ids)
    assert torch.equal(tokens, expected_tokens)
    # inductor sums in an order of its own
    error = relative_max_error(logits, expected)
    measure(TABLE, "generate, static cache, compiled", block_type, error, 2 * BOUND)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
