"""The oracle that judges the model is itself held to the original implementation."""

import pytest
import torch

from tests.model.golden_data import (
    BLOCK_TYPES,
    golden_config,
    golden_notes,
    golden_tensors,
    golden_weights,
    max_error,
)
from tests.model.oracle import Oracle

TABLE = "the float64 oracle against the goldens"


@pytest.mark.parametrize("tag", ["T40", "T7"])
@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_oracle_equals_goldens(block_type, tag, measure):
    """Logits, loss, streams and the norm of every gradient, to the rounding of the fp32 goldens."""
    golden = golden_tensors(block_type)
    oracle = Oracle(golden_config(block_type), golden_weights(block_type))
    ids, labels = golden[f"{tag}.input_ids"], golden[f"{tag}.labels"]
    error = max_error(oracle(ids), golden[f"{tag}.logits"])
    measure(TABLE, f"{tag}.logits", block_type, error, 1e-5)
    for name, value in golden.items():
        part = name.removeprefix(f"{tag}.")
        if name.startswith(tag) and part.startswith(("hidden_states", "residual_stream")):
            error = max_error(oracle.trace[part], value)
            measure(TABLE, f"{tag}.{part.split('.')[0]}", block_type, error, 1.5e-5)
    loss = oracle.loss(ids, labels)
    measure(TABLE, f"{tag}.loss", block_type, max_error(loss, golden[f"{tag}.loss"]), 1e-6)
    loss.backward()
    for name, norm in golden_notes(block_type)["grad_norms"][tag].items():
        error = abs(oracle.weights[name].grad.norm().item() - norm) / norm
        measure(TABLE, f"{tag}.grad norms", block_type, error, 5e-6)


def test_oracle_equals_goldens_with_rounded_attention(measure):
    golden = golden_tensors("rodimus_plus", "golden_bf16attn")
    config, weights = golden_config("rodimus_plus"), golden_weights("rodimus_plus")
    logits = Oracle(config, weights, bf16_attention=True)(golden["T40.input_ids"])
    error = max_error(logits, golden["T40.logits"])
    measure(TABLE, "T40.logits bf16attn", "rodimus_plus", error, 2e-3)


def test_oracle_equals_golden_parts_of_the_attention(measure):
    golden = golden_tensors("rodimus_plus")
    oracle = Oracle(golden_config("rodimus_plus"), golden_weights("rodimus_plus"))
    with torch.no_grad():
        out = oracle.attention("model.layers.0.attn", golden["attn.hidden"].double())
    error = max_error(out, golden["attn.out"])
    measure(TABLE, "attn.out", "rodimus_plus", error, 5e-6)
    error = max_error(oracle.trace["model.layers.0.attn.context"], golden["attn.context"])
    measure(TABLE, "attn.context", "rodimus_plus", error, 5e-6)
