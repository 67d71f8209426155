"""What 8-bit values of the window cost in accuracy, as tables: ``python -m
tests.generation.int8_errors``.

Relative errors in the Frobenius norm. Attention against float64 over the values as they came;
logits against the same model in float32 with a plain window. Random inputs and weights, no trained
model.
"""

import torch
from torch import Tensor

from rodimus import RodimusForCausalLM
from rodimus.generation import Engine
from rodimus_kernels import (
    int8_row_bytes,
    reference,
    ring_parts,
    shared_key_attention_step,
    write_ring,
)
from rodimus_kernels.testing import relative_error
from tests.model.helpers import build, config_of

HEADS, DIM, WINDOW = 16, 128, 2049
TOKENS = 400
"""Of the logits' text; the first 40 are read as a prompt, and the window is 33."""


def normal(*shape: int) -> Tensor:
    """Normal values."""
    return torch.randn(*shape)


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return torch.randn(*shape) / torch.randn(3, *shape).square().mean(0).sqrt()


def outlying_channel(*shape: int) -> Tensor:
    """Normal values; one channel of each head is 20 times as large."""
    values = torch.randn(*shape)
    values[..., 7] *= 20
    return values


VALUES = {"normal": normal, "heavy-tailed": heavy_tailed, "one large channel": outlying_channel}


def attention_errors() -> dict[str, tuple[float, float]]:
    """Errors of a token over a full window in bfloat16, by values: plain and int8 window."""
    found = {}
    for name, draw in VALUES.items():
        torch.manual_seed(0)
        heads = (1, DIM, HEADS, DIM)
        k = torch.randn(1, WINDOW, 1, DIM).bfloat16()
        v = draw(1, WINDOW, HEADS, DIM).bfloat16()
        q = torch.randn(1, 1, HEADS, DIM).bfloat16()
        exact = reference.shared_key_attention(q.double(), k.double(), v.double())
        errors = []
        for row, dtype in (
            (DIM + HEADS * DIM, torch.bfloat16),
            (int8_row_bytes(*heads, torch.bfloat16), torch.uint8),
        ):
            cache = torch.zeros(1, WINDOW, row, dtype=dtype)
            write_ring(ring_parts(cache, *heads, torch.bfloat16), ..., k, v)
            last, position = slice(WINDOW - 1, None), torch.tensor([WINDOW - 1])
            o = shared_key_attention_step(
                q, k[:, last], v[:, last], cache, position, window_size=WINDOW
            )
            errors.append(relative_error(o, exact))
        found[name] = tuple(errors)
    return found


def small_model() -> RodimusForCausalLM:
    """A random Rodimus+ of four blocks and a window of 33 keys."""
    config = config_of("rodimus_plus") | {"n_layer": 4, "d_model": 128}
    config["attn_cfg"] = config["attn_cfg"] | {"window_size": 64}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build(config)


def decoded(model: RodimusForCausalLM, window_dtype: torch.dtype | None) -> Tensor:
    """Logits ``[T, V]`` of every token behind the prompt, fed one by one."""
    ids = torch.randint(3, 97, (TOKENS,), generator=torch.Generator().manual_seed(1))
    engine = Engine(model, slots=1, window_dtype=window_dtype)
    logits = []
    with torch.no_grad():
        engine.states.write(0, engine.read(ids[:40]))
        for token in ids[40:]:
            engine.decoder.tokens[0] = token
            logits.append(engine.decoder(1)[0].float())
    return torch.stack(logits)


def logit_errors() -> dict[str, tuple[float, float]]:
    """By dtype of the model and of the window: error of the logits, and the share of tokens whose
    likeliest next one is another."""
    model = small_model()
    exact = decoded(model, None)
    found = {"float32, int8 window": decoded(model, torch.int8)}
    model = model.to(torch.bfloat16)
    found["bfloat16"] = decoded(model, None)
    found["bfloat16, int8 window"] = decoded(model, torch.int8)
    other = lambda logits: (logits.argmax(-1) != exact.argmax(-1)).double().mean().item()
    return {name: (relative_error(x, exact), other(x)) for name, x in found.items()}


def tables() -> tuple[list[str], list[str]]:
    """Rows of the two tables in docs/generation.md."""
    attention = [
        f"| {name} | {plain:.1e} | {int8:.1e} |"
        for name, (plain, int8) in attention_errors().items()
    ]
    logits = [
        f"| {name} | {error:.1e} | {100 * other:.1f}% |"
        for name, (error, other) in logit_errors().items()
    ]
    return attention, logits


if __name__ == "__main__":
    for rows in tables():
        print("\n".join(rows), end="\n\n")
