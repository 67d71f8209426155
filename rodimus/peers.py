"""Models that Rodimus is compared with, trained by the same loop on the same data.

A configuration file names one by ``model_type``: ``qwen2`` is transformers' own Qwen2, ``gla`` is
gated linear attention (arXiv 2312.06635) on our operator, since no package runs it on a CPU. Its
parameters and settings have flash-linear-attention's names. Both are trained with Rodimus's loss:
chunked, with z-loss, summed and divided by the token count of the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    modeling_outputs,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from rodimus_kernels import ddts, linear_cross_entropy
from rodimus_kernels.reference import RESET

from .modeling_rodimus import CACHE_NAME, RodimusCausalLMOutput, RodimusRMSNorm, only_cache


class ChunkedLoss:
    """Mixin for a causal language model of transformers: adds Rodimus's training loss."""

    def forward(self, input_ids=None, *, loss_only: bool = False, **kwargs):
        """The model's own forward; with ``loss_only`` the loss as in ``RodimusForCausalLM``, from
        ``position_ids``, ``shift_labels``, ``num_items_in_batch``, ``z_loss`` and, for a model that
        takes one, ``attention_mask``; ``is_packed`` is ignored."""
        if loss_only:
            return self._chunked_loss(input_ids, **kwargs)
        return super().forward(input_ids, **kwargs)

    def _chunked_loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        shift_labels: torch.Tensor,
        num_items_in_batch: int,
        z_loss: float = 0.0,
        use_cache: bool = False,
        is_packed: bool | None = None,
        **attention_mask: Any,
    ) -> RodimusCausalLMOutput:
        states = self.base_model(
            input_ids=input_ids, position_ids=position_ids, use_cache=use_cache, **attention_mask
        ).last_hidden_state
        losses = linear_cross_entropy(
            states.flatten(0, -2), self.lm_head.weight, shift_labels.flatten(), z_loss=z_loss
        )
        loss, cross_entropy = (value / num_items_in_batch for value in losses)
        return RodimusCausalLMOutput(loss=loss, cross_entropy=cross_entropy)


class GLAConfig(PreTrainedConfig):
    """Shapes of gated linear attention; the defaults are those of the paper's layer."""

    model_type = "gla"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        intermediate_size: int = 2816,
        vocab_size: int = 32000,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_heads, self.expand_k, self.expand_v = num_heads, expand_k, expand_v
        self.intermediate_size, self.vocab_size = intermediate_size, vocab_size
        self.norm_eps, self.initializer_range = norm_eps, initializer_range
        self.max_position_embeddings = max_position_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def key_dim(self) -> int:
        """Channels of the keys, all heads together."""
        return int(self.hidden_size * self.expand_k)

    @property
    def value_dim(self) -> int:
        """Channels of the values, all heads together."""
        return int(self.hidden_size * self.expand_v)


class GLAAttention(nn.Module):
    """Per head ``S_t = diag(a_t) S_{t-1} + k_t^T v_t``, with decay ``a = sigmoid(W x)^(1/16)``."""

    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__()
        width, keys, values = config.hidden_size, config.key_dim, config.value_dim
        self.num_heads, self.layer_idx = config.num_heads, layer_idx
        self.q_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.g_proj = nn.Linear(width, values, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(width, 16, bias=False), nn.Linear(16, keys))
        self.g_norm_swish_gate = RodimusRMSNorm(values // config.num_heads, config.norm_eps)
        self.o_proj = nn.Linear(values, width, bias=False)

    def forward(self, x, starts, states):
        decay_logits = self.gk_proj(x).to(torch.promote_types(x.dtype, torch.float32))
        log_decay = F.logsigmoid(decay_logits) / 16
        if starts is not None:
            log_decay = log_decay.masked_fill(starts[..., None], RESET)
        q, k, v, gate, log_decay = (
            y.unflatten(-1, (self.num_heads, -1))
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x), self.g_proj(x), log_decay)
        )
        state = None if states is None else states.get(self.layer_idx)
        o, state = ddts(
            q, k, v, log_decay, initial_state=state, output_final_state=states is not None
        )
        if states is not None:
            states[self.layer_idx] = state
        return self.o_proj((self.g_norm_swish_gate(o) * F.silu(gate)).flatten(-2))


class GLAMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: GLAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GLABlock(GradientCheckpointingLayer):
    """``h' = h + attn(norm(h))``, ``h' + mlp(norm(h'))`` on a float32 stream."""

    def __init__(self, config: GLAConfig, layer_idx: int):
        super().__init__()
        self.attn_norm = RodimusRMSNorm(config.hidden_size, config.norm_eps)
        self.attn = GLAAttention(config, layer_idx)
        self.mlp_norm = RodimusRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GLAMLP(config)

    def forward(self, stream, starts, states=None):
        stream = stream + self.attn(self.attn_norm(stream), starts, states)
        return stream + self.mlp(self.mlp_norm(stream))


class GLAPreTrainedModel(PreTrainedModel):
    """Weights and initialisation: transformers' own, normal with ``initializer_range``."""

    config_class = GLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLABlock"]


class GLAModel(GLAPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLABlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RodimusRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cache: dict[int, torch.Tensor] | None = None,
        use_cache: bool = False,
        past_key_values: dict[int, torch.Tensor] | None = None,
    ) -> modeling_outputs.BaseModelOutputWithPast:
        """Hidden states ``[B, T, D]`` of tokens ``[B, T]``.

        Args:
            input_ids: ``[B, T]``.
            position_ids: ``[B, T]``; a position of 0 starts a packed document.
            cache, past_key_values: State of each layer, as returned; written in place. Two names
                for one argument, as in transformers.
            use_cache: Return the states.
        """
        stream = self.embeddings(input_ids)
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        starts = None if position_ids is None else position_ids == 0
        states = only_cache(cache, past_key_values) if use_cache else None
        if use_cache and states is None:
            states = {}
        for block in self.layers:
            stream = block(stream, starts, states)
        return modeling_outputs.BaseModelOutputWithPast(
            last_hidden_state=self.norm(stream), **{CACHE_NAME: states}
        )


class GLAForCausalLM(ChunkedLoss, GLAPreTrainedModel):
    """Language model for training and evaluation; to generate, use flash-linear-attention."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: GLAConfig):
        super().__init__(config)
        self.model = GLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, *, loss_only: bool = False, **kwargs):
        """The training loss, or ``[B, T, V]`` logits, which lm-evaluation-harness asks for."""
        if loss_only:
            return super().forward(input_ids, loss_only=True, **kwargs)
        states = self.model(input_ids, **kwargs).last_hidden_state
        return modeling_outputs.CausalLMOutput(logits=self.lm_head(states))


# saved under transformers' own name, so that it loads without this package
_Qwen2 = type("Qwen2ForCausalLM", (ChunkedLoss, Qwen2ForCausalLM), {})
PEERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "gla": (GLAConfig, GLAForCausalLM),
    "qwen2": (Qwen2Config, _Qwen2),
}
