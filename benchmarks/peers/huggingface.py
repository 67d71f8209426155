"""Models of transformers, ours among them, and of flash-linear-attention. The state is kept by a
cache, by our engine's decoder or by a recorded CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..sizes import StateBytes, config_of
from .guard import Fault, Unavailable, is_installed
from .interface import OURS, Entry, Session, bytes_of, entry, random_tokens, randomize
from .llama import LLAMA_CPP, WithLlamaCpp

WARM_UP_STEPS = 3
"""Steps that run before one is recorded, to compile and choose kernels."""

PREFIX = "prefix"
"""A recorded step whose attention gets only the written places of a cache: see ``prefix.py``."""
RECORDED = ("graph", PREFIX)
"""Engines that replay a CUDA graph."""


class HuggingFaceModel(WithLlamaCpp):
    """A causal language model with transformers' interface."""

    def __init__(
        self,
        name: str,
        scale: str,
        model: nn.Module,
        engines: tuple[str, ...],
        weight_dtype: str | None,
    ):
        self.name, self.family, self.scale = name, entry(name).family, scale
        self.model, self.engines = model, engines
        parameters = {id(p): p for p in model.parameters()}.values()
        first = next(iter(parameters))
        self.device, self.dtype, self.weight_dtype = first.device, first.dtype, weight_dtype
        self.weight_bytes = sum(map(bytes_of, parameters))
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        # of an embedding that is not also the head, a token reads only one row
        read = [p for p in parameters if p is head or p is not embedding]
        self.token_bytes = sum(map(bytes_of, read))
        self.head_parameters = head.numel()
        self.body_parameters = sum(p.numel() for p in read) - head.numel()
        self.vocab_size = embedding.shape[0]

    def session(self, engine: str, batch: int, room: int) -> Session:
        if engine not in self.engines:
            raise Unavailable(f"{self.name} has the engines {self.engines}, not {engine!r}")
        if engine == LLAMA_CPP:
            return self.llama_cpp_session(batch, room)
        if engine in RECORDED:
            plain = "own" if "own" in self.engines else "static"
            below = plain if engine == "graph" else engine
            return GraphSession(HuggingFaceSession(self, below, batch, room))
        kind = EngineSession if engine == "engine" else HuggingFaceSession
        return kind(self, engine, batch, room)

    def rewinds(self, engine: str) -> bool:
        # a static cache of transformers makes attention read all of its places
        static = engine == "static" or (engine == "graph" and "static" in self.engines)
        return (static and self.name not in OURS) or engine == PREFIX

    def named_weights(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()


class HuggingFaceSession(Session):
    """A cache of transformers (``static``, ``prefix``, else a growing one), or the model's own
    (``own``)."""

    def __init__(self, owner: HuggingFaceModel, engine: str, batch: int, room: int):
        self.owner, self.engine, self.batch, self.room = owner, engine, batch, room
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=owner.device)
        self.cache_name = _cache_name(owner.family, engine)
        self.cache: Any = None

    def _new_cache(self) -> Any:
        from transformers.cache_utils import DynamicCache, StaticCache

        config = self.owner.model.config
        if self.engine == "own":
            return None
        if self.engine == PREFIX:
            from .prefix import prefix_cache

            return prefix_cache(config.num_hidden_layers, self.room)
        if self.engine == "static":
            return StaticCache(config=config, max_cache_len=self.room)
        return DynamicCache(config=config)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.cache = self._new_cache()
        return self._forward(ids)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self._forward(token)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        cache = {self.cache_name: self.cache}
        if self.engine == PREFIX and ids.shape[1] == 1:
            # attend to all that is there; while a graph is recorded transformers would make a mask
            cache["attention_mask"] = {"full_attention": None}
        output = self.owner.model(ids, use_cache=True, logits_to_keep=1, **cache)
        self.cache = output[self.cache_name]
        return output.logits[:, -1]

    def fill(self, context: int) -> None:
        # only keys and values grow: a state is as large after 8 tokens as after 8000
        whole = self.engine == "own" and self.owner.family == "rodimus_plus"
        prompt = context if whole else min(context, 8)
        self.prefill(random_tokens(self.batch, prompt, self.owner))
        _extend(self.cache, context - prompt)

    def rewind(self, context: int) -> None:
        for layer in self.cache.layers:
            if self.engine == PREFIX:
                layer.cut(context)
            else:
                # later places are masked until they are overwritten
                layer.cumulative_length.fill_(context)

    def state_bytes(self) -> StateBytes:
        recurrent = cached = 0
        for layer in getattr(self.cache, "layers", ()):
            states, keys = _tensors(layer)
            recurrent += sum(map(bytes_of, states))
            cached += sum(map(bytes_of, keys))
        if recurrent + cached == 0:
            raise Unavailable(f"the cache of {self.owner.name} does not show its tensors")
        return StateBytes(recurrent, cached)


def _cache_name(family: str, engine: str) -> str:
    from rodimus.modeling_rodimus import CACHE_NAME

    if engine == "own":
        # the name in flash-linear-attention
        return "past_key_values"
    # one name for all since transformers 5.24
    return "cache_params" if family == "mamba2" and CACHE_NAME != "cache" else CACHE_NAME


def _tensors(layer: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a layer of a cache keeps: states and taps, keys and values."""
    states = [
        tensor
        for kind in ("recurrent_states", "conv_states")
        for tensor in getattr(layer, kind, {}).values()
    ]
    keys = [layer.keys, layer.values] if getattr(layer, "keys", None) is not None else []
    if hasattr(layer, "read") and layer.ring is not None:
        keys = [layer.ring]
    # flash-linear-attention's names
    for kind, found in (getattr(layer, "state", None) or {}).items():
        several = found if isinstance(found, (tuple, list)) else [found]
        tensors = [tensor for tensor in several if isinstance(tensor, torch.Tensor)]
        (keys if kind == "attn_state" else states).extend(tensors)
    return states, keys


def _extend(cache: Any, tokens: int) -> None:
    """Append random keys and values to a cache, or count tokens where there are none."""
    if not tokens:
        return
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            keys, values = (
                torch.randn(*x.shape[:2], tokens, x.shape[-1], dtype=x.dtype, device=x.device)
                for x in (layer.keys, layer.values)
            )
            layer.update(keys, values)
        elif hasattr(layer, "read"):
            # our static layers: one counter for all, and a ring of full length from the start
            if layer.ring is not None:
                layer.ring.normal_()
            if layer is layer.read.owner:
                layer.read.count(tokens, tokens)
        elif hasattr(layer, "cumulative_length"):
            # the state of a recurrent layer is as large after 8 tokens as after 8000
            layer.cumulative_length += tokens


class EngineSession(HuggingFaceSession):
    """Our generation engine's decoder: states in slots, a ring for the window, graphs on a GPU."""

    def __init__(self, owner: HuggingFaceModel, engine: str, batch: int, room: int):
        from rodimus.generation.decode import Decoder
        from rodimus.generation.state import SlotStates, StateLayout

        super().__init__(owner, engine, batch, room)
        self.layout = StateLayout.of(owner.model.config, owner.dtype, max_length=room)
        self.slots = SlotStates(self.layout, batch, owner.device)
        self.decoder = Decoder(owner.model, self.slots)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        # the engine reads long prompts one by one
        return torch.cat([self._read(row, ids[row : row + 1]) for row in range(self.batch)])

    def _read(self, slot: int, ids: torch.Tensor) -> torch.Tensor:
        logits = super().prefill(ids)
        self._enter(slot, ids.shape[1])
        return logits

    def _enter(self, slot: int, tokens: int) -> None:
        from rodimus.generation.state import SequenceState

        read = torch.zeros(tokens, dtype=torch.long)
        self.slots.write(slot, SequenceState.from_cache(self.cache, read))

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        self.decoder.tokens.copy_(token[:, 0])
        return self.decoder(self.batch)

    def fill(self, context: int) -> None:
        prompt = min(context, 8)
        super().prefill(random_tokens(1, prompt, self.owner))
        _extend(self.cache, context - prompt)
        for slot in range(self.batch):
            self._enter(slot, context)

    def state_bytes(self) -> StateBytes:
        slots = self.slots
        return StateBytes(slots.recurrent.nbytes + slots.convolution.nbytes, slots.ring.nbytes)


class GraphSession(Session):
    """A session whose steps are recorded once in a CUDA graph and replayed.

    If a step replaces the cache's tensors, the graph ends by copying the new into the old ones.
    """

    def __init__(self, session: HuggingFaceSession):
        self.session, self.token = session, session.token
        # graphs by the number of their steps
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # tensors that the graphs read at fixed addresses
        self.kept: list[torch.Tensor] = []

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.graphs.clear()
        return self.session.prefill(ids)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.session.decode(token)

    def fill(self, context: int) -> None:
        self.graphs.clear()
        self.session.fill(context)

    def rewind(self, context: int) -> None:
        self.session.rewind(context)

    def state_bytes(self) -> StateBytes:
        return self.session.state_bytes()

    def step(self) -> None:
        self.run(1)

    def run(self, steps: int) -> None:
        """One replay, so that what has to be copied is copied once for all steps."""
        if steps not in self.graphs:
            self.graphs[steps] = self._record(steps)
        self.graphs[steps].replay()

    def _record(self, steps: int) -> torch.cuda.CUDAGraph:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self.kept = self._replaced()
        with torch.cuda.graph(graph):
            self.session.run(steps)
            for old, new in zip(self.kept, self._replaced(), strict=True):
                old.copy_(new)
        return graph

    def _warm_up(self) -> None:
        """The steps before a recording; a prefix is rewound, since it is recorded at its places."""
        places = self.session.cache.get_seq_length() if self.session.engine == PREFIX else None
        for _ in range(WARM_UP_STEPS):
            self.session.step()
        if places is not None:
            self.session.rewind(places)

    def _replaced(self) -> list[torch.Tensor]:
        """Tensors that a step replaces; a static cache and a prefix are written in place."""
        if self.session.engine in ("static", PREFIX):
            return []
        return [x for layer in self.session.cache.layers for part in _tensors(layer) for x in part]


def require_replay(model: HuggingFaceModel, ids: torch.Tensor, engine: str = "graph") -> None:
    """Raise Fault unless replays of a recorded step give the tokens of the step itself.

    A step that counts on the host, or reads what another step replaced, is recorded without an
    error, but every replay repeats the same step.

    Args:
        model: A model with the engine.
        ids: The prompt ``[B, T]``.
        engine: One of ``RECORDED``.
    """
    batch, length = ids.shape
    replayed = model.session(engine, batch, length + 16)
    plain = HuggingFaceSession(model, replayed.session.engine, batch, length + 16)
    for session in (plain, replayed):
        session.token.copy_(session.prefill(ids).argmax(-1, keepdim=True))
    plain.run(WARM_UP_STEPS)
    for _ in range(2):
        if engine == PREFIX:
            plain.rewind(length)
        plain.run(2)
        replayed.run(2)
        if not torch.equal(plain.token, replayed.token):
            raise Fault("wrong: a recorded step gives other tokens than the step itself")


def build(
    found: Entry,
    scale: str,
    dtype: torch.dtype,
    device: torch.device,
    weight_dtype: str | None,
) -> HuggingFaceModel:
    """A model of the catalogue with random weights."""
    from rodimus.loading import quantizer

    model_class, config, engines = _classes(found, scale, device)
    model = random_model(model_class, config, dtype, device)
    if found.name in OURS:
        quantizer(weight_dtype)(model)
    return HuggingFaceModel(found.name, scale, model, engines, weight_dtype)


def _classes(found: Entry, scale: str, device: torch.device) -> tuple[Any, Any, tuple[str, ...]]:
    """Model class, configuration and engines of a transformers-like model."""
    fields = config_of(found.family, scale)
    graph = ("graph",) if device.type == "cuda" else ()
    if found.source == "rodimus":
        import rodimus

        fields |= {"bos_token_id": None, "eos_token_id": None} if scale == "tiny" else {}
        config = rodimus.RodimusConfig(**fields)
        return rodimus.RodimusForCausalLM, config, ("dynamic", "static", *graph, "engine")
    if "fla" in found.source:
        # the attention of fla's Rodimus+ appends to keys and values, so no two steps are alike
        return *_fla_classes(found, fields), ("own", *(graph if found.family == "rwkv6" else ()))
    if found.family == "qwen2":
        # transformers' own, which can also be trained with our loss
        from rodimus.peers import PEERS

        config_class, model_class = PEERS["qwen2"]
        config = config_class(**fields, bos_token_id=None, eos_token_id=None)
        other = (*graph, PREFIX) if graph else (LLAMA_CPP,)
        return model_class, config, ("dynamic", "static", *other)
    import transformers

    name = {"qwen3_next": "Qwen3Next", "mamba2": "Mamba2"}[found.family]
    config = getattr(transformers, f"{name}Config")(**fields, bos_token_id=None, eos_token_id=None)
    # without the package transformers computes the recurrence in torch, and the engine is named so
    package = {"qwen3_next": "fla", "mamba2": "mamba_ssm"}[found.family]
    engine = "dynamic" if is_installed(package) else "torch"
    return getattr(transformers, f"{name}ForCausalLM"), config, (engine,)


def _fla_classes(found: Entry, fields: dict[str, Any]) -> tuple[Any, Any]:
    """RWKV6 and Rodimus+ of flash-linear-attention, in the shapes of the published models.

    Its defaults are different: RWKV6 would have 4 heads and half the key width, and Rodimus+ fails
    for more than one layer unless ``block_residual_in_fp32`` is set.
    """
    import fla.models as fla

    if found.family == "rwkv6":
        config = fla.RWKV6Config(
            hidden_size=fields["hidden_size"],
            num_hidden_layers=fields["num_hidden_layers"],
            num_heads=fields["hidden_size"] // fields["head_dim"],
            expand_k=1.0,
            expand_v=1.0,
            hidden_ratio=fields["intermediate_size"] / fields["hidden_size"],
            vocab_size=fields["vocab_size"],
        )
        return fla.RWKV6ForCausalLM, config
    attn = fields["attn_cfg"]
    config = fla.RodimusConfig(
        hidden_size=fields["d_model"],
        num_hidden_layers=fields["n_layer"],
        expand_ratio=fields["mixer_cfg"]["mem_size"],
        vocab_size=fields["vocab_size"],
        k_norm_eps=1e-5,
        block_residual_in_fp32=True,
        ska_attn={"num_heads": attn["num_heads"], "window_size": attn["window_size"] // 2},
    )
    return fla.RodimusForCausalLM, config


def random_model(
    model_class: Any, config: Any, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A model of transformers with random weights, built in its dtype without a float32 copy."""
    from transformers import initialization

    with initialization.no_init_weights(), torch.device(device):
        model = model_class._from_config(config, dtype=dtype)
    model.tie_weights()
    randomize(model.named_parameters())
    return model.eval().requires_grad_(False)
