"""Rodimus and Rodimus+ in float64, to be checked by eye: the judge of every other implementation.
Always on the CPU.

One document a row, token by token, with no cache, no padding, no packing and no import from the
packages under test. What needs padding or packing is judged by cutting its real tokens out and
running them here alone. Everything is differentiable, so gradients can be judged too.

Source: arXiv 2410.06577 and the conventions and weight names of the released checkpoints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Oracle:
    """A model made of a config dict in the released format and a dict of weights, in float64.

    Args:
        config: The released ``config.json`` as a dict.
        weights: Parameters by their released names; ``lm_head.weight`` may be absent when tied.
        bf16_attention: Round q, k (after RoPE), v and the context to bf16, as the original does.
    """

    def __init__(self, config: dict, weights: dict[str, Tensor], bf16_attention: bool = False):
        self.config = config
        self.weights = {
            name: weight.detach().cpu().double().requires_grad_()
            for name, weight in weights.items()
        }
        self.bf16_attention = bf16_attention
        self.plus = config["block_type"] == "rodimus_plus"
        self.eps = config.get("norm_epsilon", 1e-5)
        mixer = config.get("mixer_cfg") or {}
        self.mem_size = mixer.get("mem_size", 64)
        self.d_conv = mixer.get("d_conv", 4)
        self.normalize_epsilon = mixer.get("normalize_epsilon") or 1e-12
        self.trace: dict[str, Tensor] = {}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        assert shapes == parameter_shapes(config), "not the parameters of this configuration"

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits ``[B, T, vocab]`` of rows that are each one document of T tokens."""
        return self.logits(self.hidden(self.embed(input_ids)))

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the next token; labels of -100 do not count."""
        logits = self(input_ids)[:, :-1]
        labels = labels[:, 1:].flatten().cpu()
        return F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding table, before scale and norm."""
        return self.weights["model.embeddings.weight"][input_ids.cpu()]

    def hidden(self, embedded: Tensor) -> Tensor:
        """The output of the final norm ``[B, T, D]``; ``trace`` keeps what enters every block."""
        h = embedded.double()
        if self.config.get("use_scale_embedding"):
            h = h * math.sqrt(self.mem_size)
        if self.config.get("use_norm_embedding"):
            h = self.norm("model.embed_norm", h)
        residual = torch.zeros_like(h)
        for layer in range(self.config["n_layer"]):
            self.trace[f"hidden_states.{layer}"] = h
            residual = residual + h
            self.trace[f"residual_stream.{layer}"] = residual
            h, residual = self.block(f"model.layers.{layer}", residual)
        residual = residual + h
        self.trace[f"residual_stream.{self.config['n_layer']}"] = residual
        return self.norm("model.norm_f", residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head, tied to the embedding table or its own."""
        tied = self.config.get("tie_word_embeddings", False)
        return hidden @ self.weights["model.embeddings.weight" if tied else "lm_head.weight"].T

    def keep(self, name: str, **values: Tensor) -> None:
        self.trace |= {f"{name}.{part}": value for part, value in values.items()}

    def block(self, name: str, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``(what the block adds, the stream it is added to)``."""
        mixed = self.mixer(f"{name}.mixer", self.norm(f"{name}.mixer_norm", residual))
        if not self.plus:
            return mixed, residual
        residual = residual + mixed
        attended = self.attention(f"{name}.attn", self.norm(f"{name}.attn_norm", residual))
        # two hops: the ffn sees the attention's output, the stream never does
        return self.ffn(f"{name}.ffn", self.norm(f"{name}.ffn_norm", residual + attended)), residual

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = (x * x).mean(-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.eps) * self.weights[f"{name}.weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def mixer(self, name: str, hidden: Tensor) -> Tensor:
        x, gate = halves(self.linear(f"{name}.fc", hidden))
        inner = self.inner_mixer(f"{name}.inner_mixer", x)
        return self.linear(f"{name}.out_proj", self.norm(f"{name}.act_norm", inner * silu(gate)))

    def inner_mixer(self, name: str, x: Tensor) -> Tensor:
        shift = silu(self.short_conv(f"{name}.short_conv.conv1d", x))
        q, k = halves(self.linear(f"{name}.in_proj", shift))
        select, tau = halves(self.linear(f"{name}.mem_gate_proj", shift))
        select, tau = softplus(select), torch.sigmoid(tau)
        log_decay = -select * tau
        norm = torch.sqrt((k * k).sum(-1, keepdim=True))
        k = k / norm.clamp(min=self.normalize_epsilon) * select**tau
        rank = self.linear(f"{name}.ch_gate_proj.0", x)
        u = torch.sigmoid(self.linear(f"{name}.ch_gate_proj.1", rank)) * x
        o, state = recurrence(q, k, u, log_decay, scale=self.mem_size**-0.5)
        self.keep(name, shift=shift, q=q, k=k, u=u, log_decay=log_decay, o=o, state=state)
        return o + shift * self.weights[f"{name}.residual_weight"]

    def short_conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"][:, 0]
        out = torch.zeros_like(x) + self.weights[f"{name}.bias"]
        for t in range(x.shape[1]):
            for age in range(min(self.d_conv, t + 1)):
                # the last tap multiplies the current token
                out[:, t] = out[:, t] + weight[:, self.d_conv - 1 - age] * x[:, t - age]
        return out

    def attention(self, name: str, hidden: Tensor) -> Tensor:
        attn = self.config["attn_cfg"]
        heads = attn.get("num_heads") or self.config["d_model"] // 128
        q, k, v = (
            self.linear(f"{name}.{part}", hidden).unflatten(-1, (-1, hidden.shape[-1] // heads))
            for part in ("q_proj", "k_proj", "v_proj")
        )
        q, k = self.rope(q), self.rope(k)
        if self.bf16_attention:
            q, k, v = q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double()
        window = attn.get("window_size")
        reach = window // 2 if window else hidden.shape[1]
        columns = []
        for head in range(heads):
            keys, values = k[:, :, head % k.shape[2]], v[:, :, head % v.shape[2]]
            rows = []
            for t in range(hidden.shape[1]):
                first = max(0, t - reach)
                score = (keys[:, first : t + 1] * q[:, t, None, head]).sum(-1) / math.sqrt(
                    q.shape[-1]
                )
                weight = torch.softmax(score, -1)
                rows.append((weight[..., None] * values[:, first : t + 1]).sum(1))
            columns.append(torch.stack(rows, 1))
        context = torch.stack(columns, 2)
        if self.bf16_attention:
            context = context.bfloat16().double()
        self.keep(name, q=q, k=k, v=v, context=context)
        return self.linear(f"{name}.out_proj", context.flatten(2))

    def rope(self, x: Tensor) -> Tensor:
        """Rotate the first ``rotary_emb_dim`` channels in pairs half of them apart; -1: all."""
        attn = self.config["attn_cfg"]
        dim = attn.get("rotary_emb_dim", -1)
        dim = x.shape[-1] if dim < 0 else dim
        if dim == 0:
            return x
        base = attn.get("rotary_emb_base", 10000.0)
        out = x.clone()
        for pair in range(dim // 2):
            angle = torch.arange(x.shape[1], dtype=torch.float64) / base ** (2 * pair / dim)
            cos, sin = torch.cos(angle)[None, :, None], torch.sin(angle)[None, :, None]
            a, b = x[..., pair], x[..., pair + dim // 2]
            out[..., pair] = a * cos - b * sin
            out[..., pair + dim // 2] = a * sin + b * cos
        return out

    def ffn(self, name: str, hidden: Tensor) -> Tensor:
        x, gate = halves(self.linear(f"{name}.fc", hidden))
        return self.linear(f"{name}.out_proj", silu(gate) * x)


class RoundedOracle(Oracle):
    """What bf16 makes of it: rounds where a model in bf16 stores its numbers, and nowhere else."""

    def __init__(self, config: dict, weights: dict[str, Tensor]):
        super().__init__(config, weights, bf16_attention=True)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rounded(super().norm(name, x))

    def linear(self, name: str, x: Tensor) -> Tensor:
        if not name.endswith("mem_gate_proj"):
            return rounded(super().linear(name, x))
        # its bias is added in float32
        return rounded(x @ self.weights[f"{name}.weight"].T) + self.weights[f"{name}.bias"]

    def short_conv(self, name: str, x: Tensor) -> Tensor:
        return rounded(super().short_conv(name, x))

    def inner_mixer(self, name: str, x: Tensor) -> Tensor:
        return rounded(super().inner_mixer(name, x))

    def rope(self, x: Tensor) -> Tensor:
        return rounded(super().rope(x))

    def logits(self, hidden: Tensor) -> Tensor:
        return rounded(super().logits(hidden))


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a configuration's parameters, as released checkpoints save them."""
    width, mixer, attn = config["d_model"], config["mixer_cfg"], config["attn_cfg"]
    inner = round_up_to_8(width * mixer.get("expand_ratio", 2))
    mem_size = mixer.get("mem_size", 64)
    rank = mixer.get("input_gate_low_rank", "auto")
    rank = max(width // 64, 16) if rank == "auto" else rank
    block = {
        "mixer_norm.weight": (width,),
        "mixer.fc.weight": (2 * inner, width),
        "mixer.act_norm.weight": (inner,),
        "mixer.out_proj.weight": (width, inner),
        "mixer.inner_mixer.residual_weight": (inner,),
        "mixer.inner_mixer.short_conv.conv1d.weight": (inner, 1, mixer.get("d_conv", 4)),
        "mixer.inner_mixer.short_conv.conv1d.bias": (inner,),
        "mixer.inner_mixer.in_proj.weight": (2 * mem_size, inner),
        "mixer.inner_mixer.ch_gate_proj.0.weight": (rank, inner),
        "mixer.inner_mixer.ch_gate_proj.1.weight": (inner, rank),
        "mixer.inner_mixer.ch_gate_proj.1.bias": (inner,),
        "mixer.inner_mixer.mem_gate_proj.weight": (2 * mem_size, inner),
        "mixer.inner_mixer.mem_gate_proj.bias": (2 * mem_size,),
    }
    if config["block_type"] == "rodimus_plus":
        heads = attn.get("num_heads") or width // 128
        hidden = round_up_to_8(width * attn.get("ffn_expand_ratio", 4 / 3))
        block |= {
            "attn_norm.weight": (width,),
            "attn.q_proj.weight": (width, width),
            "attn.k_proj.weight": (width // heads * attn["num_heads_k"], width),
            "attn.v_proj.weight": (width // heads * attn["num_heads_v"], width),
            "attn.out_proj.weight": (width, width),
            "ffn_norm.weight": (width,),
            "ffn.fc.weight": (2 * hidden, width),
            "ffn.out_proj.weight": (width, hidden),
        }
    shapes = {"model.embeddings.weight": (config["vocab_size"], width)}
    if config.get("use_norm_embedding"):
        shapes["model.embed_norm.weight"] = (width,)
    for layer in range(config["n_layer"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm_f.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def round_up_to_8(size: float) -> int:
    return -(-int(size) // 8) * 8


def recurrence(q: Tensor, k: Tensor, u: Tensor, log_decay: Tensor, scale: float):
    """``S_t = exp(log_decay_t) S_{t-1} + k_t^T u_t`` and ``o_t = scale q_t S_t``."""
    state = q.new_zeros(q.shape[0], q.shape[2], u.shape[2])
    out = []
    for t in range(q.shape[1]):
        state = torch.exp(log_decay[:, t, :, None]) * state + k[:, t, :, None] * u[:, t, None, :]
        out.append(scale * (q[:, t, :, None] * state).sum(1))
    return torch.stack(out, 1), state


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second half of the channels."""
    width = x.shape[-1] // 2
    return x[..., :width], x[..., width:]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
