"""Networks of the quality experiments: one layer with five gates, and the real models.

The ablation changes only the gate. Projections, the key's norm, convolution, state size,
initialisation and the count of parameters are the same to the last tensor. A gate keeps the
parameters that it does not use.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import rodimus_kernels as ops

GATES = ("rodimus", "gla", "mamba2", "rwkv6", "none")
MODELS = ("rodimus_plus", "attention")
VARIANTS = (*GATES, *MODELS)


class Shape(NamedTuple):
    """Size of a network.

    Attributes:
        vocab: Tokens.
        width: Width of the residual stream; the state has 2 * width value channels.
        mem_size: Key channels of the state.
        layers: Mixers in a row.
        window: Keys that Rodimus+ sees, its own included.
    """

    vocab: int
    width: int
    mem_size: int
    layers: int = 2
    window: int = 65

    @property
    def state_bytes(self) -> int:
        """float32 bytes of one layer's recurrent state."""
        return 4 * self.mem_size * 2 * self.width


def gate(
    kind: str, k: torch.Tensor, select: torch.Tensor, temper: torch.Tensor, rate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Written key and log-decay of each gate, ``[B, T, K]`` each, in float32.

    Every gate writes keys of unit length, as the formula of Rodimus does: the models of the other
    names would otherwise differ from it in two things at once.

    rodimus: tempered selection (arXiv 2410.06577); gla: log-sigmoid / 16 (arXiv 2312.06635);
    mamba2: one decay per token, whose step size scales the key (arXiv 2405.21060); rwkv6:
    exp(-exp(w)) per channel (arXiv 2404.05892); none: nothing is forgotten.
    """
    if kind == "rodimus":
        return ops.ddts_gates(k, select, temper)
    k = F.normalize(k.float(), dim=-1)
    if kind == "gla":
        return k, F.logsigmoid(select + 4) / 16
    if kind == "mamba2":
        step = F.softplus(select[..., :1])
        return k * step, (-step * rate.exp()).expand_as(k)
    if kind == "rwkv6":
        return k, -torch.exp((select - 1).clamp_max(4))
    if kind == "none":
        return k, torch.zeros_like(k)
    raise ValueError(f"gate must be one of {GATES}, got {kind!r}")


class GatedMixer(nn.Module):
    """The mixer of Rodimus with the gate as a parameter."""

    def __init__(self, shape: Shape, kind: str):
        super().__init__()
        inner, keys, rank = 2 * shape.width, shape.mem_size, 16
        self.kind = kind
        self.fc = nn.Linear(shape.width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 4, groups=inner)
        self.in_proj = nn.Linear(inner, 2 * keys, bias=False)
        self.mem_gate = nn.Linear(inner, 2 * keys)
        self.value_gate = nn.Sequential(
            nn.Linear(inner, rank, bias=False), nn.Linear(rank, inner), nn.Sigmoid()
        )
        self.log_rate = nn.Parameter(torch.log(torch.empty(1).uniform_(1, 16)))
        self.residual_weight = nn.Parameter(torch.ones(inner))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, shape.width, bias=False)
        self._initialize(keys)

    @torch.no_grad()
    def _initialize(self, keys: int) -> None:
        """As Rodimus starts: decays of 0.9 to 0.999 a step at temperature 1."""
        for linear in (self.in_proj, self.mem_gate, *self.value_gate[:2]):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.zeros_(self.value_gate[1].bias)
        rate = torch.exp(torch.rand(keys) * math.log(100) + math.log(1e-3))
        temper = torch.logit(torch.empty(keys).uniform_(1 / 16, 0.9))
        self.mem_gate.bias.copy_(torch.cat((rate + torch.log(-torch.expm1(-rate)), temper)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[B, T, width]`` to the same shape."""
        u, z = self.fc(x).chunk(2, -1)
        shifted, _ = ops.short_conv(u, self.conv.weight.squeeze(1), self.conv.bias)
        q, k = self.in_proj(shifted).chunk(2, -1)
        select, temper = self.mem_gate(shifted).float().chunk(2, -1)
        k, log_decay = gate(self.kind, k, select, temper, self.log_rate)
        v = self.value_gate(u) * u
        one_head = (y.unsqueeze(2) for y in (q, k.to(q.dtype), v, log_decay))
        o, _ = ops.ddts(*one_head)
        y = ops.gated_rms_norm(
            o.squeeze(2),
            z,
            self.norm_weight,
            eps=1e-5,
            residual=shifted,
            residual_weight=self.residual_weight,
        )
        return self.out_proj(y)


class GateNetwork(nn.Module):
    """Embedding, mixers with pre-norm and residual, final norm; the head is the embedding."""

    def __init__(self, shape: Shape, kind: str):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(shape.width) for _ in range(shape.layers + 1))
        self.mixers = nn.ModuleList(GatedMixer(shape, kind) for _ in range(shape.layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[B, T, width]``."""
        x = self.embedding(ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.norms[-1](x)

    @property
    def head(self) -> torch.Tensor:
        """``[vocab, width]``."""
        return self.embedding.weight


class ModelNetwork(nn.Module):
    """A causal language model of transformers as a network of the experiments."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[B, T, width]``."""
        return self.model.model(ids, use_cache=False).last_hidden_state

    @property
    def head(self) -> torch.Tensor:
        """``[vocab, width]``."""
        return self.model.lm_head.weight


def build(variant: str, shape: Shape) -> nn.Module:
    """A network: one of the gates, Rodimus+ itself, or full attention (Qwen2's layers).

    Raises:
        ValueError: an unknown variant.
    """
    if variant in GATES:
        return GateNetwork(shape, variant)
    heads = max(shape.width // 32, 1)
    if variant == "rodimus_plus":
        import rodimus

        config = rodimus.RodimusConfig(
            block_type="rodimus_plus",
            d_model=shape.width,
            n_layer=shape.layers,
            vocab_size=shape.vocab,
            tie_word_embeddings=True,
            mixer_cfg={"mem_size": shape.mem_size},
            attn_cfg={"num_heads": heads, "window_size": 2 * (shape.window - 1)},
        )
        return ModelNetwork(rodimus.RodimusForCausalLM(config))
    if variant == "attention":
        import transformers

        config = transformers.Qwen2Config(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
        return ModelNetwork(transformers.Qwen2ForCausalLM(config))
    raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")


def state_bytes(variant: str, shape: Shape, length: int) -> int:
    """float32 bytes that one layer keeps after ``length`` tokens, without convolution taps."""
    heads = max(shape.width // 32, 1)
    if variant == "attention":
        return 4 * 2 * shape.width * length
    if variant == "rodimus_plus":
        seen = min(length, shape.window - 1)
        return shape.state_bytes + 4 * seen * (1 + heads) * (shape.width // heads)
    return shape.state_bytes
