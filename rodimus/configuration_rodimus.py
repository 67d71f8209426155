"""Configuration of Rodimus and Rodimus+ in the released format: every hyper-parameter, checked."""

import difflib
import math
import operator
from numbers import Integral
from types import MappingProxyType

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCK_TYPES = ("rodimus", "rodimus_plus")

MIXER_DEFAULTS = {
    "d_conv": 4,
    "expand_ratio": 2,
    "mem_size": 64,
    "input_gate_low_rank": "auto",
    "mode": "fused_chunk",
    "normalize_epsilon": None,
}

ATTENTION_DEFAULTS = {
    "num_heads": None,
    "num_heads_k": 1,
    "num_heads_v": None,
    "window_size": None,
    "rotary_emb_dim": -1,
    "rotary_emb_base": 10000.0,
    "rotary_emb_scale_base": None,
    "rotary_emb_interleaved": False,
    "softmax_scale": None,
    "ffn_expand_ratio": 4 / 3,
}

# Options of the released format that no released model uses: other values are refused.
_FIXED = {"rotary_emb_scale_base": None, "rotary_emb_interleaved": False, "softmax_scale": None}

# transformers' usual names for what attn_cfg says about positions: they have no effect.
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")

# Fields that only flash-linear-attention's configuration of the same model_type has.
_FLA_FIELDS = ("ska_attn", "attn_mode", "k_norm_eps", "block_residual_in_fp32", "hidden_ratio")


def align(size: int, multiple: int = 8) -> int:
    """Round up to a multiple."""
    return -(-size // multiple) * multiple


class RodimusConfig(PreTrainedConfig):
    """Configuration of a Rodimus or Rodimus+ model; ``config.json`` keeps the released field names.

    The usual names are derived from them: ``hidden_size``, ``num_hidden_layers``,
    ``num_attention_heads`` and ``sliding_window`` can be passed or assigned as well; others
    (``head_dim``, ``num_key_value_heads``, ``intermediate_size``, ...) are derived and can be read.

    Args:
        block_type: ``"rodimus"`` (mixer only) or ``"rodimus_plus"`` (mixer, attention, gated MLP).
        d_model: Width of the residual stream, None for 2048.
        n_layer: Number of blocks, None for 24.
        vocab_size: Rows of the embedding.
        norm_epsilon: Added to the mean square in every RMSNorm.
        initializer_range: Standard deviation of embeddings and plain linear layers.
        rescale_prenorm_residual: Divide the output projections' init by sqrt(branches * n_layer).
        residual_in_fp32: Keep the residual stream in float32.
        dropout, activation_dropout, attention_dropout: Probabilities, in training.
        mixer_cfg: ``d_conv`` taps of the short convolution; ``expand_ratio`` of the inner width,
            rounded up to a multiple of 8; ``mem_size`` key channels of the state;
            ``input_gate_low_rank`` or "auto" for max(d_model // 64, 16); ``normalize_epsilon``
            lower bound of the key norm, None for 1e-12; ``mode`` is kept, not used.
        attn_cfg: ``num_heads``, None for d_model // 128; ``num_heads_k``; ``num_heads_v``, None for
            num_heads; ``window_size`` w: a query sees the w // 2 keys before it and its own; None
            or 0 means all keys, as does a dict without ``window_size``, while no ``attn_cfg`` at
            all means 4096; ``rotary_emb_dim`` channels rotated, -1 for all, 0 for none;
            ``rotary_emb_base``; ``ffn_expand_ratio`` of the MLP.
        max_position_embeddings: Training length; a hint for tools, not a limit.
        use_scale_embedding: Multiply embeddings by sqrt(mem_size).
        use_norm_embedding: RMSNorm after the embedding.

    Raises:
        ValueError: a value is impossible or two disagree; the message gives expected and got.
    """

    model_type = "rodimus"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "cross_entropy"]
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}
    # trl reads this from every model whose class is not one of transformers' own
    auto_map = MappingProxyType({})
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm_f": "keep_full_weight",
    }

    def __init__(
        self,
        block_type="rodimus",
        d_model=None,
        n_layer=None,
        vocab_size=50277,
        norm_epsilon=1e-5,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        residual_in_fp32=True,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        mixer_cfg=None,
        attn_cfg=None,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        use_cache=True,
        use_scale_embedding=False,
        use_norm_embedding=False,
        **kwargs,
    ):
        _refuse_other_format(kwargs)
        _report_rope_fields(kwargs)
        _refuse_misplaced("mixer_cfg", MIXER_DEFAULTS, kwargs)
        _refuse_misplaced("attn_cfg", ATTENTION_DEFAULTS, kwargs)
        self.block_type = block_type
        self.d_model = _one_of("d_model", d_model, 2048, "hidden_size", kwargs)
        self.n_layer = _one_of("n_layer", n_layer, 24, "num_hidden_layers", kwargs)
        self.vocab_size = _plain(vocab_size)
        self.norm_epsilon = norm_epsilon
        self.initializer_range = initializer_range
        self.rescale_prenorm_residual = rescale_prenorm_residual
        self.residual_in_fp32 = residual_in_fp32
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.attention_dropout = attention_dropout
        self.mixer_cfg = _complete("mixer_cfg", mixer_cfg, MIXER_DEFAULTS)
        self.attn_cfg = _complete("attn_cfg", attn_cfg, ATTENTION_DEFAULTS)
        if attn_cfg is None:
            self.attn_cfg["window_size"] = 4096
        self.max_position_embeddings = _plain(max_position_embeddings)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        self.use_scale_embedding = use_scale_embedding
        self.use_norm_embedding = use_norm_embedding
        # Derived names may be passed: the settable ones are translated, the others must agree.
        for name in ("num_attention_heads", "sliding_window"):
            if name in kwargs:
                setattr(self, name, kwargs.pop(name))
        derived = {name: kwargs.pop(name) for name in _DERIVED if name in kwargs}
        self.check()
        for name, value in derived.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"{name} follows from the other fields:"
                    f" expected {getattr(self, name)}, got {value}"
                )
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but a folder without config.json is an error, not all defaults."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields:
            raise OSError(f"{pretrained_model_name_or_path} holds no config.json")
        return fields, kwargs

    def check(self) -> None:
        """Raise ValueError for a configuration that no model can have."""
        if self.block_type not in BLOCK_TYPES:
            raise ValueError(f"block_type must be one of {BLOCK_TYPES}, got {self.block_type!r}")
        _require_complete("mixer_cfg", self.mixer_cfg, MIXER_DEFAULTS)
        _require_complete("attn_cfg", self.attn_cfg, ATTENTION_DEFAULTS)
        for name in _FLAGS:
            _require_flag(name, getattr(self, name))
        for name in ("d_model", "n_layer", "vocab_size"):
            _require_positive(name, getattr(self, name))
        for name in ("norm_epsilon", "initializer_range"):
            _require_number(name, getattr(self, name))
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            _require_number(name, getattr(self, name), most=1)
        for name in ("mem_size", "d_conv"):
            _require_positive(f"mixer_cfg['{name}']", self.mixer_cfg[name])
        _require_ratio("mixer_cfg['expand_ratio']", self.mixer_cfg["expand_ratio"])
        _require_number("mixer_cfg['normalize_epsilon']", self.normalize_epsilon)
        if self.mixer_cfg["input_gate_low_rank"] != "auto":
            rank = self.mixer_cfg["input_gate_low_rank"]
            _require_number("mixer_cfg['input_gate_low_rank']", rank, least=1)
        if self.block_type == "rodimus_plus":
            self._check_attention()

    def _check_attention(self) -> None:
        options, heads = self.attn_cfg, self.num_attention_heads
        _require_positive("attn_cfg['num_heads']", heads)
        if self.d_model % heads:
            raise ValueError(
                f"d_model must be divisible by num_heads, got {self.d_model} and {heads}"
            )
        counts = {"num_heads_k": self.num_key_value_heads, "num_heads_v": self.num_value_heads}
        for name, count in counts.items():
            _require_positive(f"attn_cfg['{name}']", count)
            if heads % count:
                raise ValueError(f"num_heads must be divisible by {name}, got {heads} and {count}")
        _require_ratio("attn_cfg['rotary_emb_base']", options["rotary_emb_base"])
        rotary = options["rotary_emb_dim"]
        if rotary is not None and not _is_integer(rotary):
            raise ValueError(f"attn_cfg['rotary_emb_dim'] must be an integer, got {rotary!r}")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"attn_cfg['rotary_emb_dim'] must be even and at most head_dim = {self.head_dim},"
                f" got {self.rotary_dim}"
            )
        window = options["window_size"]
        if window is not None and (not _is_integer(window) or window < -1 or window == 1):
            raise ValueError(
                f"attn_cfg['window_size'] must be None, -1 or 0 (no window) or an integer >= 2,"
                f" got {window!r}"
            )
        _require_ratio("attn_cfg['ffn_expand_ratio']", options["ffn_expand_ratio"])
        for name, value in _FIXED.items():
            if options[name] != value:
                raise ValueError(
                    f"attn_cfg['{name}'] = {options[name]!r} is not supported, expected {value!r}"
                )

    @property
    def d_inner(self) -> int:
        """Width of the mixer, and of the state's values."""
        return align(int(self.d_model * self.mixer_cfg["expand_ratio"]))

    @property
    def mem_size(self) -> int:
        """Key channels of the recurrent state."""
        return self.mixer_cfg["mem_size"]

    @property
    def input_gate_rank(self) -> int:
        """Rank of the input gate."""
        rank = self.mixer_cfg["input_gate_low_rank"]
        return max(self.d_model // 64, 16) if rank == "auto" else int(rank)

    @property
    def normalize_epsilon(self) -> float:
        """Lower bound of the key norm."""
        epsilon = self.mixer_cfg["normalize_epsilon"]
        return 1e-12 if epsilon is None else epsilon

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""
        return self.attn_cfg["num_heads"] or max(self.d_model // 128, 1)

    @num_attention_heads.setter
    def num_attention_heads(self, value):
        if value != self.num_attention_heads:
            self.attn_cfg["num_heads"] = _plain(value)
            self.attn_cfg["num_heads_v"] = None

    @property
    def num_key_value_heads(self) -> int:
        """Key heads; the values have their own number, ``num_value_heads``."""
        return self.attn_cfg["num_heads_k"] or 1

    @property
    def num_value_heads(self) -> int:
        """Value heads."""
        return self.attn_cfg["num_heads_v"] or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Channels of a query, key or value head."""
        return self.d_model // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        dim = self.attn_cfg["rotary_emb_dim"]
        return self.head_dim if dim is None or dim < 0 else dim

    @property
    def intermediate_size(self) -> int:
        """Width of the gated MLP."""
        return align(int(self.d_model * self.attn_cfg["ffn_expand_ratio"]))

    @property
    def sliding_window(self) -> int | None:
        """Keys that a query sees, its own included: the released ``window_size // 2 + 1``."""
        window = self.attn_cfg["window_size"]
        if self.block_type != "rodimus_plus" or not window or window < 0:
            return None
        return window // 2 + 1

    @sliding_window.setter
    def sliding_window(self, value):
        if value is not None and value < 2:
            raise ValueError(f"sliding_window must be None or at least 2, got {value}")
        self.attn_cfg["window_size"] = None if value is None else 2 * (_plain(value) - 1)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each block, in transformers' names."""
        if self.block_type == "rodimus":
            return ["linear_attention"] * self.n_layer
        return ["hybrid" if self.sliding_window is None else "hybrid_sliding"] * self.n_layer


_FLAGS = (
    "rescale_prenorm_residual",
    "residual_in_fp32",
    "tie_word_embeddings",
    "use_scale_embedding",
    "use_norm_embedding",
)

_DERIVED = (
    "num_key_value_heads",
    "num_value_heads",
    "head_dim",
    "intermediate_size",
    "layer_types",
)


def _one_of(name, value, default, alias, kwargs):
    """A field given under its own name or the usual one; two values must agree."""
    other = kwargs.pop(alias, None)
    if None not in (value, other) and value != other:
        raise ValueError(f"{name} and {alias} are one field, got {value!r} and {other!r}")
    given = other if value is None else value
    return default if given is None else _plain(given)


def _plain(value):
    """An integer of numpy as one of Python, which JSON can express; other values as they are."""
    is_other = isinstance(value, Integral) and not isinstance(value, int)
    return operator.index(value) if is_other else value


def _require_flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def _require_positive(name, value):
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _require_ratio(name, value):
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _require_number(name, value, least=0, most=math.inf):
    if not _is_number(value) or not least <= value <= most:
        limit = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be a number, {limit}, got {value!r}")


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _complete(name, given, defaults):
    """The given options over the defaults; an unknown one is an error with a suggestion."""
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{name} must be a dict of options, got {given!r}")
    for key in given or {}:
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f", did you mean {close[0]!r}?" if close else f"; known: {sorted(defaults)}"
            raise ValueError(f"unknown option {key!r} in {name}{hint}")
    return {**defaults, **{key: _plain(value) for key, value in (given or {}).items()}}


def _require_complete(name, options, defaults):
    """Raise for missing options: ``from_pretrained(folder, attn_cfg=...)`` replaces all of them."""
    missing = [key for key in defaults if key not in options]
    if missing:
        key, value = next(iter(options.items()), (missing[0], ...))
        raise ValueError(
            f"{name} lacks {', '.join(map(repr, missing))}: what from_pretrained is given replaces"
            f" all options. To change one, load the config, set config.{name}[{key!r}] = {value!r},"
            " and pass it as config="
        )


def _refuse_misplaced(name, options, kwargs):
    """Raise for an option that is given beside its dict, where it would have no effect."""
    found = {key: value for key, value in kwargs.items() if key in options}
    if found:
        raise ValueError(f"{', '.join(found)} belongs in {name}: expected {name}={found}")


def _report_rope_fields(fields):
    """Warn only: a released configuration may have these fields, but its model never read them."""
    found = {name: fields[name] for name in _ROPE_FIELDS if fields.get(name) is not None}
    if found:
        logger.warning_once(
            f"not read: {found}. The base of rotary positions, which cannot be scaled, is"
            " attn_cfg['rotary_emb_base']."
        )


def _refuse_other_format(fields):
    found = [name for name in _FLA_FIELDS if name in fields]
    if found:
        raise ValueError(
            f"this is a configuration of flash-linear-attention (it has {', '.join(found)}), which"
            " uses the same model_type; expected the released format."
            " rodimus.convert turns such a checkpoint into ours."
        )


__all__ = ["RodimusConfig"]
