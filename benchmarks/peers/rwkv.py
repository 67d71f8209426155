"""RWKV6 in its own package ``rwkv``, on the CPU."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..sizes import StateBytes, config_of
from .guard import Unavailable
from .interface import Session, bytes_of, random_tokens, randomize
from .llama import LLAMA_CPP, WithLlamaCpp


class RwkvModel(WithLlamaCpp):
    """RWKV6 in the package ``rwkv``, which reads a checkpoint file and handles one sequence."""

    engines = ("package", LLAMA_CPP)

    def __init__(self, scale: str, dtype: torch.dtype, weight_dtype: str | None):
        from rwkv.model import RWKV

        self.name, self.family, self.scale = "rwkv6-1.6b", "rwkv6", scale
        self.dtype, self.device, self.weight_dtype = dtype, torch.device("cpu"), weight_dtype
        weights = self.named_weights()
        self.weight_bytes = sum(map(bytes_of, weights.values()))
        self.token_bytes = self.weight_bytes - bytes_of(weights["emb.weight"])
        self.head_parameters = weights["head.weight"].numel()
        self.body_parameters = sum(x.numel() for x in weights.values()) - (
            self.head_parameters + weights["emb.weight"].numel()
        )
        self.vocab_size = weights["emb.weight"].shape[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rwkv6.pth"
            torch.save(weights, path)
            del weights
            gc.collect()
            name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
            self.package = RWKV(
                model=str(path.with_suffix("")), strategy=f"cpu {name}", verbose=False
            )

    def session(self, engine: str, batch: int, room: int) -> Session:
        if batch != 1:
            raise Unavailable(f"the package rwkv decodes one sequence, not {batch}")
        if engine == LLAMA_CPP:
            return self.llama_cpp_session(batch, room)
        return RwkvSession(self)

    def named_weights(self) -> Mapping[str, torch.Tensor]:
        # made anew, because the package keeps its own copy
        return dict(random_checkpoint(config_of("rwkv6", self.scale), self.dtype))


class RwkvSession(Session):
    """The package's list of states."""

    def __init__(self, owner: RwkvModel):
        self.owner = owner
        self.state: list[torch.Tensor] | None = None
        self.token = torch.zeros(1, 1, dtype=torch.long)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.state = None
        return self.decode(ids)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        logits, self.state = self.owner.package.forward(token[0].tolist(), self.state)
        return logits[None]

    def fill(self, context: int) -> None:
        # the state is as large after 8 tokens as after 8000
        self.prefill(random_tokens(1, min(context, 8), self.owner))

    def state_bytes(self) -> StateBytes:
        return StateBytes(sum(map(bytes_of, self.state or ())), 0)


def random_checkpoint(c: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """A random checkpoint with the names and shapes of RWKV-LM's version 6 (``x060``)."""
    width, hidden, heads = (
        c["hidden_size"],
        c["intermediate_size"],
        c["hidden_size"] // c["head_dim"],
    )
    mix, decay = c["mix_rank"], c["decay_rank"]
    matrices: dict[str, tuple[int, ...]] = {
        "att.time_maa_w1": (width, 5 * mix),
        "att.time_maa_w2": (5, mix, width),
        "att.time_decay_w1": (width, decay),
        "att.time_decay_w2": (decay, width),
        "att.time_faaaa": (heads, c["head_dim"]),
        **{f"att.{n}.weight": (width, width) for n in ("receptance", "key", "value", "gate")},
        "att.output.weight": (width, width),
        **{f"att.time_maa_{n}": (1, 1, width) for n in "xwkvrg"},
        **{f"ffn.time_maa_{n}": (1, 1, width) for n in "kr"},
        "ffn.key.weight": (hidden, width),
        "ffn.receptance.weight": (width, width),
        "ffn.value.weight": (width, hidden),
    }
    norms = ("ln1", "ln2", "att.ln_x")
    outer = {"emb.weight": (c["vocab_size"], width), "head.weight": (c["vocab_size"], width)}
    shapes = dict(outer)
    for layer in range(c["num_hidden_layers"]):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in matrices.items()}
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    randomize(tensors.items())
    yield from tensors.items()
    for layer in range(c["num_hidden_layers"]):
        # a decay of exp(-exp(-3)) = 0.95 per token, the published models' initial value
        base = torch.full((1, 1, width), -3.0, dtype=dtype)
        yield f"blocks.{layer}.att.time_decay", base
        for name in norms + (("ln0",) if layer == 0 else ()):
            yield f"blocks.{layer}.{name}.weight", torch.ones(width, dtype=dtype)
            yield f"blocks.{layer}.{name}.bias", torch.zeros(width, dtype=dtype)
    yield "ln_out.weight", torch.ones(width, dtype=dtype)
    yield "ln_out.bias", torch.zeros(width, dtype=dtype)
