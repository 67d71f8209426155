"""Peers in llama.cpp on the CPU: the weights of a model here, written as GGUF and read back.

The same numbers then run in both engines, so that their logits can be compared. Needs the packages
``gguf`` and ``llama-cpp-python``. No extra installs the second: it is compiled for the machine it
runs on, and a binary built for another one may lack its instructions.
"""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import machine
from ..sizes import StateBytes, config_of
from .guard import Fault, Unavailable, require_package
from .interface import Model, Session, random_tokens

LLAMA_CPP = "llama.cpp"
"""An engine of Qwen2 and RWKV6 on a CPU, with the same weights as the others."""

_PROMPT_BATCH = 512
"""Tokens of a prompt that are read at once, llama.cpp's own default."""

Tensors = Iterator[tuple[str, torch.Tensor]]


class LlamaCpp:
    """A model that llama.cpp has loaded.

    Args:
        family: ``qwen2`` or ``rwkv6``.
        config: Its fields, as in ``sizes``.
        weights: Matrices in bfloat16 or float32, and vectors, under the names of transformers
            (Qwen2) or RWKV-LM (RWKV6).
        weight_dtype: ``"int8"`` rounds the matrices that llama.cpp's converter would round, to its
            Q8_0; ``"int4"`` lets llama.cpp's quantiser round the file to Q4_0.

    Attributes:
        weight_bytes: All weights.
        token_bytes: Those that one token reads.

    Raises:
        Unavailable: a package is missing, there is no memory, or the file is refused.
    """

    def __init__(
        self,
        family: str,
        config: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        *,
        weight_dtype: str | None = None,
    ):
        require_package("llama_cpp", "llama-cpp-python")
        require_package("gguf", "gguf")
        import llama_cpp

        self.library, self.vocab_size = llama_cpp, config["vocab_size"]
        self.device, self.grows = torch.device("cpu"), family == "qwen2"
        self.in_float32 = all(x.dtype == torch.float32 for x in weights.values())
        self.log = _start()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{family}.gguf"
            held = write_gguf(path, family, config, weights, in_8_bits=weight_dtype == "int8")
            if weight_dtype == "int4":
                held = self._round_to_q4_0(path)
            self.weight_bytes = self.token_bytes = sum(held.values())
            if "output.weight" in held:
                self.token_bytes -= held["token_embd.weight"]
            size, free = path.stat().st_size, machine.memory_bytes(torch.device("cpu"))
            if size > free:
                raise Unavailable(f"needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            params = llama_cpp.llama_model_default_params()
            # hold weights as the other engines do: in memory of the process, not mapped from a file
            params.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise Unavailable(f"llama.cpp refused the model: {''.join(self.log[-3:])}")
        # when Python exits, __del__ would run after the library's functions are gone
        weakref.finalize(self, llama_cpp.llama_model_free, self.model)

    def _round_to_q4_0(self, path: Path) -> dict[str, int]:
        """Replace a file by what llama.cpp's quantiser makes of it; the bytes of each tensor."""
        import gguf

        params = self.library.llama_model_quantize_default_params()
        params.ftype = self.library.LLAMA_FTYPE_MOSTLY_Q4_0
        rounded = path.with_name("rounded.gguf")
        names = os.fsencode(path), os.fsencode(rounded)
        if self.library.llama_model_quantize(*names, ctypes.byref(params)):
            raise Unavailable(f"llama.cpp did not round the model: {''.join(self.log[-3:])}")
        rounded.replace(path)
        return {x.name: int(x.n_bytes) for x in gguf.GGUFReader(path).tensors}


@functools.cache
def _start() -> list[str]:
    """Start the library; returns the list to which its log is appended."""
    import llama_cpp

    said: list[str] = []
    callback = llama_cpp.llama_log_callback(lambda _, text, __: said.append(str(text)))
    # the library calls this for as long as it is loaded, even after all models are gone
    _KEPT.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    return said


_KEPT: list[Any] = []


class LlamaCppSession(Session):
    """One sequence in a context of llama.cpp. With weights in bfloat16 it has its defaults (keys
    and values in float16, flash attention where it chooses it), with float32 nothing shorter."""

    def __init__(self, owner: LlamaCpp, batch: int, room: int):
        if batch != 1:
            raise Unavailable(f"llama.cpp decodes one sequence here, not {batch}")
        self.owner, self.library = owner, owner.library
        self.token = torch.zeros(1, 1, dtype=torch.long)
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_batch = room, _PROMPT_BATCH
        if owner.in_float32:
            params.type_k = params.type_v = self.library.GGML_TYPE_F32
            params.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self.context = self.library.llama_init_from_model(owner.model, params)
        if not self.context:
            raise Unavailable(f"llama.cpp made no context: {''.join(owner.log[-3:])}")
        weakref.finalize(self, self.library.llama_free, self.context)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        for part in ids.split(_PROMPT_BATCH, dim=1):
            logits = self.decode(part)
        return logits

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        tokens = token[0].tolist()
        array = (self.library.llama_token * len(tokens))(*tokens)
        status = self.library.llama_decode(
            self.context, self.library.llama_batch_get_one(array, len(tokens))
        )
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")
        logits = self.library.llama_get_logits_ith(self.context, -1)
        row = np.ctypeslib.as_array(logits, (self.owner.vocab_size,))
        return torch.from_numpy(row.copy())[None]

    def fill(self, context: int) -> None:
        # keys and values cannot be set from outside; a state does not grow
        length = context if self.owner.grows else min(context, 8)
        self.prefill(random_tokens(1, length, self.owner))

    def state_bytes(self) -> StateBytes:
        raise Unavailable("llama.cpp does not show the tensors of its state")


class WithLlamaCpp(Model):
    """A model that llama.cpp can run as well, if ``LLAMA_CPP`` is one of its engines."""

    @abstractmethod
    def named_weights(self) -> Mapping[str, torch.Tensor]:
        """Weights under the names of their checkpoints."""

    @functools.cached_property
    def in_llama_cpp(self) -> LlamaCpp:
        """The model in llama.cpp, loaded at its first use."""
        return self._load_llama_cpp(self.weight_dtype)

    def _load_llama_cpp(self, weight_dtype: str | None) -> LlamaCpp:
        config = config_of(self.family, self.scale)
        return LlamaCpp(self.family, config, self.named_weights(), weight_dtype=weight_dtype)

    def llama_cpp_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[1, vocab]`` after a prompt ``[1, T]`` in llama.cpp, with weights that are not
        rounded."""
        room = ids.shape[1] + 1
        if not self.weight_dtype:
            return self.session(LLAMA_CPP, 1, room).prefill(ids)
        return LlamaCppSession(self._load_llama_cpp(None), 1, room).prefill(ids)

    def bytes_in(self, engine: str) -> tuple[int, int]:
        """``(weight_bytes, token_bytes)`` as an engine holds the weights."""
        held = self.in_llama_cpp if engine == LLAMA_CPP else self
        return held.weight_bytes, held.token_bytes

    def llama_cpp_session(self, batch: int, room: int) -> Session:
        """A session of the engine ``LLAMA_CPP``."""
        return LlamaCppSession(self.in_llama_cpp, batch, room)


def require_same_logits(model: WithLlamaCpp, ids: torch.Tensor, limit: float) -> None:
    """Raise Fault unless llama.cpp gives the logits of the model's first engine, with weights
    that are not rounded: the same code writes both kinds.

    Args:
        model: A model with the engine ``LLAMA_CPP``.
        ids: The prompt ``[1, T]``.
        limit: Limit of the relative error.
    """
    engine = model.engines[0]
    first = model.session(engine, 1, ids.shape[1] + 1).prefill(ids).double()
    error = ((model.llama_cpp_logits(ids).double() - first).norm() / first.norm()).item()
    if not error <= limit:
        raise Fault(f"wrong: logits differ from {engine}'s by {error:.1e}")


def write_gguf(
    path: Path,
    family: str,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    *,
    in_8_bits: bool = False,
) -> dict[str, int]:
    """Write a model without a tokenizer; arguments as for :class:`LlamaCpp`. Matrices keep their
    dtype or are rounded, vectors are float32. Returns the bytes of each tensor."""
    import gguf

    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    add, tensors = {"qwen2": (_add_qwen2, _qwen2), "rwkv6": (_add_rwkv6, _rwkv6)}[family]
    add(writer, config)
    held = {}
    for name, tensor in tensors(weights, config):
        kind = None
        if in_8_bits and _is_rounded(name, tensor):
            kind = gguf.GGMLQuantizationType.Q8_0
            numbers = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        elif tensor.dim() > 1 and tensor.dtype == torch.bfloat16:
            kind = gguf.GGMLQuantizationType.BF16
            numbers = tensor.contiguous().view(torch.uint8).numpy()
        else:
            numbers = tensor.float().contiguous().numpy()
        writer.add_tensor(name, numbers, raw_dtype=kind)
        held[name] = numbers.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _is_rounded(name: str, tensor: torch.Tensor) -> bool:
    """Whether llama.cpp's converter rounds a tensor: matrices of whole blocks, except the small
    ones of RWKV's token shift and decay."""
    small = any(part in name for part in ("time_mix_w", "time_mix_decay_w", "time_mix_first"))
    return tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and not small


def _add_qwen2(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])


_QWEN2 = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _qwen2(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output.weight", weights["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        for theirs, name in _QWEN2.items():
            for kind in ("weight", "bias"):
                found = weights.get(f"model.layers.{layer}.{theirs}.{kind}")
                if found is not None:
                    yield f"blk.{layer}.{name}.{kind}", found


def _add_rwkv6(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_context_length(2**20)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rescale_every_n_layers(0)
    writer.add_wkv_head_size(config["head_dim"])
    writer.add_time_mix_extra_dim(config["mix_rank"])
    writer.add_time_decay_extra_dim(config["decay_rank"])


_RWKV6 = {
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.receptance": "time_mix_receptance",
    "att.key": "time_mix_key",
    "att.value": "time_mix_value",
    "att.gate": "time_mix_gate",
    "att.output": "time_mix_output",
    "att.ln_x": "time_mix_ln",
    "ffn.key": "channel_mix_key",
    "ffn.receptance": "channel_mix_receptance",
    "ffn.value": "channel_mix_value",
}


def _rwkv6(weights: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Tensors:
    yield "token_embd.weight", weights["emb.weight"]
    for kind in ("weight", "bias"):
        yield f"token_embd_norm.{kind}", weights[f"blocks.0.ln0.{kind}"]
        yield f"output_norm.{kind}", weights[f"ln_out.{kind}"]
    yield "output.weight", weights["head.weight"]
    for layer in range(config["num_hidden_layers"]):
        of = lambda name, layer=layer: weights[f"blocks.{layer}.{name}"]
        block = f"blk.{layer}"
        for theirs, name in _RWKV6.items():
            yield f"{block}.{name}.weight", of(f"{theirs}.weight")
            if "ln" in theirs:
                yield f"{block}.{name}.bias", of(f"{theirs}.bias")
        # RWKV-LM multiplies by these from the right
        yield f"{block}.time_mix_w1.weight", of("att.time_maa_w1").T
        yield f"{block}.time_mix_w2.weight", of("att.time_maa_w2").transpose(1, 2)
        yield f"{block}.time_mix_decay_w1.weight", of("att.time_decay_w1").T
        yield f"{block}.time_mix_decay_w2.weight", of("att.time_decay_w2").T
        yield f"{block}.time_mix_decay.weight", of("att.time_decay").flatten()
        yield f"{block}.time_mix_first.weight", of("att.time_faaaa").float()
        yield f"{block}.time_mix_lerp_x.weight", of("att.time_maa_x").flatten()
        mixes = [of(f"att.time_maa_{name}").view(1, 1, -1) for name in "wkvrg"]
        yield f"{block}.time_mix_lerp_fused.weight", torch.stack(mixes).float()
        yield f"{block}.channel_mix_lerp_k.weight", of("ffn.time_maa_k").flatten()
        yield f"{block}.channel_mix_lerp_r.weight", of("ffn.time_maa_r").flatten()
