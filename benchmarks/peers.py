"""Every model behind one interface: random weights, one dtype, the same tokens.

A ``Model`` holds one set of weights. A ``Session`` is one batch of sequences in one engine of that
model: it prefills, decodes greedily with the argmax inside the timed step, and tells the bytes it
keeps. Weights are random and never zero: a processor can be faster on zeros than on data.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import signal
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from rodimus_kernels import Int8Weight, decode_weight

from . import machine
from .sizes import StateBytes, config_of, sequence_flops, state_bytes

if TYPE_CHECKING:
    from . import llama


class Unavailable(Exception):
    """A model or engine that cannot run here; the message is the reason for the record."""


class Entry(NamedTuple):
    """A model of the catalogue."""

    name: str
    family: str
    source: str


# in the order in which they are loaded: what matters most first, should memory not suffice for all
CATALOGUE = (
    Entry("rodimus-plus-1.6b", "rodimus_plus", "rodimus"),
    Entry("rwkv6-1.6b", "rwkv6", "rwkv or fla"),
    Entry("qwen2-1.5b", "qwen2", "transformers"),
    Entry("rodimus-1.4b", "rodimus", "rodimus"),
    Entry("qwen3-next-like-1.5b", "qwen3_next", "transformers"),
    Entry("mamba2-like-1.5b", "mamba2", "transformers"),
    Entry("fla-rodimus-plus-1.6b", "rodimus_plus", "fla"),
)
OURS = ("rodimus-plus-1.6b", "rodimus-1.4b")
BASELINES = ("qwen2-1.5b", "rwkv6-1.6b")

LLAMA_CPP = "llama.cpp"
"""An engine of Qwen2 and RWKV6 on a CPU, with the weights of the others."""

SEED = 0
"""Of all random weights and tokens."""

WARM_UP_STEPS = 3
"""Steps before one is recorded: kernels are compiled and chosen in them."""


def entry(name: str) -> Entry:
    """The catalogue's entry of a name.

    Raises:
        ValueError: the name is not in the catalogue.
    """
    for found in CATALOGUE:
        if found.name == name:
            return found
    raise ValueError(f"expected a model of {[e.name for e in CATALOGUE]}, got {name!r}")


class Session(ABC):
    """One batch of sequences in one engine.

    Attributes:
        token: Long ``[B, 1]``, the token that the next step reads and replaces.
    """

    token: torch.Tensor

    @abstractmethod
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start over with a prompt ``[B, T]``; logits ``[B, vocab]`` of the last position."""

    @abstractmethod
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Append one token ``[B, 1]``; logits ``[B, vocab]`` of the next."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Stand after ``context`` random tokens, without the cost of computing them."""

    def rewind(self, context: int) -> None:
        """Stand after the first ``context`` tokens again; for engines of which the model's
        ``rewinds`` is true."""
        raise NotImplementedError(f"{type(self).__name__} cannot forget tokens")

    @abstractmethod
    def state_bytes(self) -> StateBytes:
        """Bytes the session keeps between two tokens, counted on its tensors."""

    def step(self) -> None:
        """One greedy token: forward, argmax, and the token becomes the next input."""
        # in float32, as transformers; torch's argmax of bfloat16 is six times as slow on a CPU
        self.token.copy_(self.decode(self.token).float().argmax(-1, keepdim=True))

    def run(self, steps: int) -> None:
        """Several greedy tokens, one after the other."""
        for _ in range(steps):
            self.step()


class Model(ABC):
    """One set of weights.

    Attributes:
        name, family: From the catalogue.
        engines: Names that ``session`` takes.
        dtype, device: Of the weights.
        weight_bytes: All weights.
        token_bytes: Weights that one token reads: all but an embedding that is not the head.
        body_parameters: Of all products of a token but that which gives the logits.
        in_8_bits: Whether the matrices of linear layers have 8 bits, in our models and in
            llama.cpp.
        head_parameters: Of the product that gives the logits.
        vocab_size: Tokens.
    """

    name: str
    family: str
    scale: str
    engines: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int
    token_bytes: int
    body_parameters: int
    head_parameters: int
    vocab_size: int
    in_8_bits: bool

    @abstractmethod
    def session(self, engine: str, batch: int, room: int) -> Session:
        """A session for ``batch`` sequences of at most ``room`` tokens.

        Raises:
            Unavailable: the engine cannot do that.
        """

    def rewinds(self, engine: str) -> bool:
        """Whether a step of the engine takes as long as its session has room, however few tokens
        it holds: to be timed at a context it has to have no more room, and be rewound."""
        return False

    def forward_flops(self, batch: int, length: int, *, logits: int) -> float:
        """Operations of a forward pass over ``[batch, length]``, a multiply-add counted as two.

        Counted are the products with weights, attention over the keys that a token sees, and
        writing and reading each recurrent state once a token.

        Args:
            logits: Positions of each sequence that get logits.
        """
        body = self.body_parameters
        config = config_of(self.family, self.scale)
        mixing = sequence_flops(self.family, config, length)
        return 2.0 * batch * (length * body + logits * self.head_parameters) + batch * mixing

    def expected_state(self, batch: int, context: int) -> StateBytes:
        """What the formulas say that a session keeps."""
        config = config_of(self.family, self.scale)
        return state_bytes(self.family, config, batch, context, self.dtype.itemsize)

    @abstractmethod
    def named_weights(self) -> Mapping[str, torch.Tensor]:
        """Weights under the names of their checkpoints."""

    @functools.cached_property
    def in_llama_cpp(self) -> llama.LlamaCpp:
        """The model in llama.cpp, loaded at its first use."""
        return self._load_llama_cpp(self.in_8_bits)

    def _load_llama_cpp(self, in_8_bits: bool) -> llama.LlamaCpp:
        from . import llama

        config = config_of(self.family, self.scale)
        return llama.LlamaCpp(self.family, config, self.named_weights(), in_8_bits=in_8_bits)

    def llama_cpp_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[1, vocab]`` behind a prompt ``[1, T]`` in llama.cpp, of weights that are not
        rounded to 8 bits."""
        from . import llama

        room = ids.shape[1] + 1
        if not self.in_8_bits:
            return self.session(LLAMA_CPP, 1, room).prefill(ids)
        return llama.LlamaCppSession(self._load_llama_cpp(False), 1, room).prefill(ids)

    def bytes_in(self, engine: str) -> tuple[int, int]:
        """``(weight_bytes, token_bytes)`` as an engine holds the weights."""
        held = self.in_llama_cpp if engine == LLAMA_CPP else self
        return held.weight_bytes, held.token_bytes

    def llama_cpp_session(self, batch: int, room: int) -> Session:
        """A session of the engine ``LLAMA_CPP``."""
        from . import llama

        return llama.LlamaCppSession(self.in_llama_cpp, batch, room)


# ----------------------------------------------------------------------------------------------
# Models of transformers, ours among them, and of flash-linear-attention
# ----------------------------------------------------------------------------------------------


class HuggingFaceModel(Model):
    """A causal language model with transformers' interface."""

    def __init__(
        self,
        name: str,
        scale: str,
        model: nn.Module,
        engines: tuple[str, ...],
        in_8_bits: bool,
    ):
        self.name, self.family, self.scale = name, entry(name).family, scale
        self.model, self.engines = model, engines
        parameters = {id(p): p for p in model.parameters()}.values()
        first = next(iter(parameters))
        self.device, self.dtype, self.in_8_bits = first.device, first.dtype, in_8_bits
        self.weight_bytes = sum(map(_bytes, parameters))
        embedding, head = (
            found.weight for found in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        self.token_bytes = self.weight_bytes - (0 if head is embedding else _bytes(embedding))
        self.head_parameters = head.numel()
        unread = 0 if head is embedding else embedding.numel()
        self.body_parameters = sum(p.numel() for p in parameters) - unread - head.numel()
        self.vocab_size = embedding.shape[0]

    def session(self, engine: str, batch: int, room: int) -> Session:
        if engine not in self.engines:
            raise Unavailable(f"{self.name} has the engines {self.engines}, not {engine!r}")
        if engine == LLAMA_CPP:
            return self.llama_cpp_session(batch, room)
        if engine == "graph":
            below = "own" if "own" in self.engines else "static"
            return GraphSession(HuggingFaceSession(self, below, batch, room))
        kind = EngineSession if engine == "engine" else HuggingFaceSession
        return kind(self, engine, batch, room)

    def rewinds(self, engine: str) -> bool:
        # attention over all places of a static cache of transformers
        static = engine == "static" or (engine == "graph" and "static" in self.engines)
        return static and self.name not in OURS

    def named_weights(self) -> Mapping[str, torch.Tensor]:
        return self.model.state_dict()


class HuggingFaceSession(Session):
    """A cache of transformers (``static``, else a growing one), or the model's own (``own``)."""

    def __init__(self, owner: HuggingFaceModel, engine: str, batch: int, room: int):
        self.owner, self.engine, self.batch, self.room = owner, engine, batch, room
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=owner.device)
        self.cache_name = "cache_params" if owner.family == "mamba2" else "past_key_values"
        self.cache: Any = None

    def _new_cache(self) -> Any:
        from transformers.cache_utils import DynamicCache, StaticCache

        config = self.owner.model.config
        if self.engine == "own":
            return None
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
        output = self.owner.model(ids, use_cache=True, logits_to_keep=1, **cache)
        self.cache = output[self.cache_name]
        return output.logits[:, -1]

    def fill(self, context: int) -> None:
        # only keys and values grow: a state is as long after 8 tokens as after 8000
        whole = self.engine == "own" and self.owner.family == "rodimus_plus"
        prompt = context if whole else min(context, 8)
        self.prefill(random_tokens(self.batch, prompt, self.owner))
        _extend(self.cache, context - prompt)

    def rewind(self, context: int) -> None:
        for layer in self.cache.layers:
            # later places are masked until they are written anew
            layer.cumulative_length.fill_(context)

    def state_bytes(self) -> StateBytes:
        recurrent = cached = 0
        for layer in getattr(self.cache, "layers", ()):
            states, keys = _tensors(layer)
            recurrent += sum(map(_bytes, states))
            cached += sum(map(_bytes, keys))
        if recurrent + cached == 0:
            raise Unavailable(f"the cache of {self.owner.name} does not show its tensors")
        return StateBytes(recurrent, cached)


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


def _bytes(tensor: torch.Tensor) -> int:
    held = decode_weight(tensor)
    parts = held if isinstance(held, Int8Weight) else (held,)
    return sum(part.numel() * part.element_size() for part in parts)


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
            # our static layers: one count for all, and a ring that is as long from the start
            if layer.ring is not None:
                layer.ring.normal_()
            if layer is layer.read.owner:
                layer.read.count(tokens, tokens)
        elif hasattr(layer, "cumulative_length"):
            # the state of a recurrent layer is as long after 8 tokens as after 8000
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
        # the engine reads prompts one by one
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

    Where a step replaces the cache's tensors, the graph ends by copying the new into the old ones.
    """

    def __init__(self, session: HuggingFaceSession):
        self.session, self.token = session, session.token
        # by the number of their steps
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # the graphs read them at fixed addresses
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
            for _ in range(WARM_UP_STEPS):
                self.session.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.kept = self._replaced()
        with torch.cuda.graph(graph):
            self.session.run(steps)
            for old, new in zip(self.kept, self._replaced(), strict=True):
                old.copy_(new)
        return graph

    def _replaced(self) -> list[torch.Tensor]:
        """Tensors that a step replaces: a static cache writes in place."""
        if self.session.engine == "static":
            return []
        return [x for layer in self.session.cache.layers for part in _tensors(layer) for x in part]


def require_replay(model: HuggingFaceModel, ids: torch.Tensor) -> None:
    """Raise Unavailable unless replays of a recorded step give the tokens of the step itself.

    A step that counts on the host, or reads what another step replaced, is recorded without an
    error and repeats itself.

    Args:
        model: Has the engine ``graph``.
        ids: The prompt ``[B, T]``.
    """
    replayed = model.session("graph", ids.shape[0], ids.shape[1] + 16)
    plain = model.session(replayed.session.engine, ids.shape[0], ids.shape[1] + 16)
    for session in (plain, replayed):
        session.token.copy_(session.prefill(ids).argmax(-1, keepdim=True))
    for _ in range(2):
        replayed.run(2)
    plain.run(WARM_UP_STEPS + 4)
    if not torch.equal(plain.token, replayed.token):
        raise Unavailable("wrong: a recorded step gives other tokens than the step itself")


def require_same_logits(model: Model, ids: torch.Tensor, limit: float) -> None:
    """Raise Unavailable unless llama.cpp gives the logits of the model's first engine, with weights
    that are not rounded to 8 bits: those are written by the same code.

    Args:
        model: Has the engine ``LLAMA_CPP``.
        ids: The prompt ``[1, T]``.
        limit: Of the relative error.
    """
    engine = model.engines[0]
    first = model.session(engine, 1, ids.shape[1] + 1).prefill(ids).double()
    error = ((model.llama_cpp_logits(ids).double() - first).norm() / first.norm()).item()
    if not error <= limit:
        raise Unavailable(f"wrong: logits differ from {engine}'s by {error:.1e}")


def _build(
    entry: Entry,
    scale: str,
    dtype: torch.dtype,
    device: torch.device,
    in_8_bits: bool,
) -> HuggingFaceModel:
    from rodimus.loading import quantizer

    model_class, config, engines = _classes(entry, scale, device)
    model = random_model(model_class, config, dtype, device)
    if in_8_bits and entry.name in OURS:
        quantizer("int8")(model)
    return HuggingFaceModel(entry.name, scale, model, engines, in_8_bits)


def _classes(entry: Entry, scale: str, device: torch.device) -> tuple[Any, Any, tuple[str, ...]]:
    """Model class, configuration and engines of a transformers-like model."""
    fields = config_of(entry.family, scale)
    graph = ("graph",) if device.type == "cuda" else ()
    if entry.source == "rodimus":
        import rodimus

        fields |= {"bos_token_id": None, "eos_token_id": None} if scale == "tiny" else {}
        config = rodimus.RodimusConfig(**fields)
        return rodimus.RodimusForCausalLM, config, ("dynamic", "static", *graph, "engine")
    if "fla" in entry.source:
        # the attention of its Rodimus+ appends to keys and values: no two steps are alike
        return *_fla_classes(entry, fields), ("own", *(graph if entry.family == "rwkv6" else ()))
    if entry.family == "qwen2":
        # transformers' own, which can also be trained with our loss
        from rodimus.peers import PEERS

        config_class, model_class = PEERS["qwen2"]
        config = config_class(**fields, bos_token_id=None, eos_token_id=None)
        other = graph or (LLAMA_CPP,)
        return model_class, config, ("dynamic", "static", *other)
    import transformers

    name = {"qwen3_next": "Qwen3Next", "mamba2": "Mamba2"}[entry.family]
    config = getattr(transformers, f"{name}Config")(**fields, bos_token_id=None, eos_token_id=None)
    # without its package transformers computes the recurrence by torch: a row says so
    package = {"qwen3_next": "fla", "mamba2": "mamba_ssm"}[entry.family]
    engine = "dynamic" if importlib.util.find_spec(package) else "torch"
    return getattr(transformers, f"{name}ForCausalLM"), config, (engine,)


def _fla_classes(entry: Entry, fields: dict[str, Any]) -> tuple[Any, Any]:
    """RWKV6 and Rodimus+ of flash-linear-attention, in the shapes of the published models.

    Its defaults are neither: RWKV6 would have 4 heads and half the key width, and Rodimus+ fails
    for more than one layer unless ``block_residual_in_fp32`` is set.
    """
    import fla.models as fla

    if entry.family == "rwkv6":
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


@torch.no_grad()
def randomize(parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Matrices get N(0, 1 / inputs), biases and log-rates 0, norms and other vectors 1.

    The normal numbers are one pool that is repeated with a shift: a billion parameters then take a
    second, and no product is faster for it.
    """
    pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    for i, (name, parameter) in enumerate(parameters):
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith(("bias", "A_log")) else 1.0)
            continue
        key = parameter.dtype, parameter.device
        if key not in pools:
            generator = torch.Generator().manual_seed(SEED)
            pool = torch.randn(2**22 + 3, generator=generator)
            pools[key] = pool.to(parameter.dtype).to(parameter.device)
        _tile(parameter, pools[key].roll(7919 * i) * parameter.shape[-1] ** -0.5)


def _tile(parameter: torch.Tensor, pool: torch.Tensor) -> None:
    flat = parameter.view(-1)
    whole = flat.numel() // pool.numel() * pool.numel()
    flat[:whole].view(-1, pool.numel()).copy_(pool.expand(whole // pool.numel(), -1))
    flat[whole:].copy_(pool[: flat.numel() - whole])


# ----------------------------------------------------------------------------------------------
# RWKV6 by its own package, on the CPU
# ----------------------------------------------------------------------------------------------


class RwkvModel(Model):
    """RWKV6 by the package ``rwkv``, which reads a checkpoint file and knows one sequence."""

    engines = ("package", LLAMA_CPP)

    def __init__(self, scale: str, dtype: torch.dtype, in_8_bits: bool):
        from rwkv.model import RWKV

        self.name, self.family, self.scale = "rwkv6-1.6b", "rwkv6", scale
        self.dtype, self.device, self.in_8_bits = dtype, torch.device("cpu"), in_8_bits
        weights = self.named_weights()
        self.weight_bytes = sum(map(_bytes, weights.values()))
        self.token_bytes = self.weight_bytes - _bytes(weights["emb.weight"])
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
        # made anew: the package keeps its own
        return dict(_rwkv6_weights(config_of("rwkv6", self.scale), self.dtype))


class RwkvSession(Session):
    """The package's list of states."""

    def __init__(self, owner: RwkvModel):
        self.owner = owner
        self.state: list[torch.Tensor] | None = None
        self.token = torch.zeros(1, 1, dtype=torch.long)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.state = None
        return self._forward(ids)

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self._forward(token)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits, self.state = self.owner.package.forward(ids[0].tolist(), self.state)
        return logits[None]

    def fill(self, context: int) -> None:
        # the state is as long after 8 tokens as after 8000
        self.prefill(random_tokens(1, min(context, 8), self.owner))

    def state_bytes(self) -> StateBytes:
        return StateBytes(sum(map(_bytes, self.state or ())), 0)


def _rwkv6_weights(c: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
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
        # a decay of exp(-exp(-3)) = 0.95 a token, as the published models start with
        base = torch.full((1, 1, width), -3.0, dtype=dtype)
        yield f"blocks.{layer}.att.time_decay", base
        for name in norms + (("ln0",) if layer == 0 else ()):
            yield f"blocks.{layer}.{name}.weight", torch.ones(width, dtype=dtype)
            yield f"blocks.{layer}.{name}.bias", torch.zeros(width, dtype=dtype)
    yield "ln_out.weight", torch.ones(width, dtype=dtype)
    yield "ln_out.bias", torch.zeros(width, dtype=dtype)


# ----------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------


def load(
    name: str,
    scale: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_8_bits: bool = False,
) -> Model:
    """A model of the catalogue with random weights.

    Args:
        in_8_bits: Round the matrices of linear layers to 8 bits, in our models (torchao, one scale
            for each output) and in llama.cpp (Q8_0); other engines keep what they have.

    Raises:
        Unavailable: a package, a GPU or the memory is missing; the message says which.
        ValueError: an unknown name or scale.
    """
    found = entry(name)
    _require(found, device)
    if scale == "full":
        # 1.6 billion parameters; the package rwkv holds them twice while it reads its file
        needed = 1.7e9 * dtype.itemsize * (2.2 if found.family == "rwkv6" else 1.0)
        free = machine.memory_bytes(device)
        if free < needed:
            raise Unavailable(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    if found.family == "rwkv6" and device.type == "cpu":
        return RwkvModel(scale, dtype, in_8_bits)
    return _build(found, scale, dtype, device, in_8_bits)


def _require(found: Entry, device: torch.device) -> None:
    """Raise Unavailable unless the packages that the model needs are there and run here."""
    on_cpu = device.type == "cpu"
    if found.family == "rwkv6" and on_cpu:
        require_package("rwkv", "rwkv")
    elif "fla" in found.source:
        if on_cpu:
            raise Unavailable("flash-linear-attention runs on a GPU only")
        require_package("fla", "flash-linear-attention")
        if found.family == "rodimus_plus":
            require_package("flash_attn", "flash-attn")


def require_package(module: str, distribution: str) -> None:
    """Raise Unavailable unless there is such a package."""
    if not is_installed(module):
        raise Unavailable(f"{distribution} is not installed")


def is_installed(module: str) -> bool:
    """Whether there is a package of that name, and not just a folder that others put things into,
    as flash-attn 4 alone leaves ``flash_attn``."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # of a parent
        return False
    return found is not None and found.origin is not None


def random_tokens(batch: int, length: int, model: Model) -> torch.Tensor:
    """Tokens ``[B, T]`` on the model's device, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.vocab_size, (batch, length), generator=generator)
    return ids.to(model.device)


def disagreement(session: Session, ids: torch.Tensor) -> float:
    """Relative error between one prefill and the same tokens with the last one decoded.

    Args:
        session: Is left after ``ids``.
        ids: ``[B, T]``, T at least 2.
    """
    whole = session.prefill(ids).double()
    session.prefill(ids[:, :-1])
    stepped = session.decode(ids[:, -1:]).double()
    return ((stepped - whole).norm() / whole.norm()).item()


class _Late(BaseException):
    """Raised by the alarm; no ``except Exception`` of a peer may swallow it."""


def guarded(call: Callable[[], Any], limit: float | None = None) -> Any:
    """Run a peer's code; what it raises becomes the reason why it was skipped.

    A peer is third-party code on a machine it may not know: whatever goes wrong in it is part of
    the result, and must not take the other peers' results with it.

    Args:
        call: What to run.
        limit: Seconds after which it is interrupted, between two of Python's instructions; needs
            the main thread.
    """
    try:
        with _alarm(limit):
            return call()
    except Unavailable:
        raise
    except _Late:
        if limit is None:
            raise
        raise Unavailable(f"too slow: not done after {limit:g} s") from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"{type(error).__name__}: {lines[0]}") from error


@contextlib.contextmanager
def _alarm(limit: float | None) -> Iterator[None]:
    if limit is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
