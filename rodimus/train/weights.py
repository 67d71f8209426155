"""Existing weights as the initial ones of a run: checked on the host, then sharded.

Rank 0 reads the folder with the package's loading code and sends every rank its shards, one
parameter after another: no device holds more than one whole parameter besides its own shards. A
resumed run has weights of its own and reads none.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import InputError
from ..loading import (
    checkpoint_folder,
    has_tokenizer,
    is_hub_name,
    load_config,
    load_model,
    model_class,
    read_config,
    read_tokenizer,
    stored_dtypes,
    tokenizer_folder,
)
from ..run_folder import complete_steps
from . import parallel
from .config import TrainConfig
from .initialize import assign
from .shards import TokenShards
from .tokenizer import tokenizer_digest

_FLOATING = {"float64", "float32", "bfloat16", "float16"}
_MARKS = {"bos_token_id": "begin", "eos_token_id": "end"}
REMARKS = {
    *("transformers_version", "architectures", "dtype", "_name_or_path", "auto_map"),
    *_MARKS,
}
"""Fields of a configuration that do not affect what a model computes."""
_CARRIED = {
    *("pad_token_id", "use_cache", "head_dim"),
    *("use_fast_path", "use_fused_swiglu", "use_fused_cross_entropy"),
    *(f"no_weight_decay_on_{what}" for what in ("bias", "embedding", "norm")),
}
"""Fields that a configuration may have although its class does not declare them: for generation,
the width of Qwen2's heads in transformers, switches of the released code."""


def has_begun(config: TrainConfig) -> bool:
    """Whether the run has a checkpoint to go on from."""
    return bool(complete_steps(Path(config.out) / "checkpoints"))


def read_model_config(config: TrainConfig, begun: bool) -> PreTrainedConfig:
    """The model configuration of a run: ``model.config``; without it the one that the run has begun
    with, or else that of ``model.weights``.

    Raises:
        InputError: it cannot be read, or ``model.config`` has an unknown key.
    """
    if config.model.config:
        model = read_config(Path(config.model.config))
        _check_keys(config.model.config, model)
        return model
    if begun:
        return read_config(Path(config.out) / "model.json")
    return load_config(checkpoint_folder(config.model.weights))


def take_marks(model: PreTrainedConfig, data: TokenShards) -> list[str]:
    """Gives a configuration the tokens that begin and end the documents of its data: generation
    stops at the configured end token, which may be a word of another tokenizer.

    Returns:
        Messages about the tokens that were different.
    """
    told = []
    for name, happens in _MARKS.items():
        own, mark = getattr(model, name, None), getattr(data.manifest, name)
        if mark is not None and mark not in (own if isinstance(own, list) else [own]):
            setattr(model, name, mark)
            told.append(
                f"{name}: the model's configuration has {own}, but documents of the data {happens}"
                f" with {mark}, which is used"
            )
    return told


def _check_keys(path: str, model: PreTrainedConfig) -> None:
    """Refuses keys that transformers keeps without knowing them: most often they are typos."""
    default = type(model)()
    known = [*default.to_dict(), *default.attribute_map]
    for key in vars(model):
        if hasattr(default, key) or key in REMARKS | _CARRIED:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
        raise InputError(f"{path}: unknown key {key!r}{hint}")


def weights_name(config: TrainConfig) -> str:
    """``model.weights`` as a run remembers it: an absolute path, or a name on the hub."""
    name = config.model.weights
    return name if not name or is_hub_name(name) else str(Path(name).expanduser().absolute())


class ExistingWeights:
    """The weights that ``model.weights`` names.

    Args:
        config: The run.
        model: Its model.
        data: Shards of its data, for their tokenizer.
        ranks: This process among the others.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedConfig,
        data: TokenShards,
        ranks: parallel.Ranks,
    ) -> None:
        self.name, self.model, self.data, self.ranks = config.model.weights, model, data, ranks
        self.told: list[str] = []
        self._is_read, self._weights = False, {}

    def read(self) -> None:
        """Checks the folder and reads it into the memory of rank 0; all ranks must call it.

        Raises:
            InputError: the folder is missing or damaged, its model is another one, its tokens are
                not those of the data, or its weights are not floating-point.
        """
        parallel.together(lambda: self._read() if self.ranks.is_main else None, self.ranks)
        self._is_read = True

    def _read(self) -> None:
        folder = checkpoint_folder(self.name)
        theirs = load_config(folder)
        self.told = check_model(self.model, theirs, folder) + check_tokens(folder, self.data)
        dtypes = stored_dtypes(folder)
        if not dtypes <= _FLOATING:
            found = ", ".join(sorted(dtypes - _FLOATING))
            raise InputError(f"{folder} holds weights in {found}: model.weights must be floating")
        # float32 holds all of these dtypes exactly, except float64
        loaded = load_model(folder, dtype=torch.float32)
        self._weights = stored(loaded)
        names = " and ".join(sorted(dtypes))
        kept = "" if dtypes == {"float32"} else f" ({names}, kept in float32 from now on)"
        self.told.insert(0, f"the run starts from the weights in {folder}{kept}")

    @torch.no_grad()
    def give_to(self, model: nn.Module) -> None:
        """Copies the weights bit for bit into a sharded model and drops them; all ranks must call
        it."""
        if not self._is_read:
            self.read()
        for name, target in stored(model).items():
            value = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if self.ranks.is_main:
                value.copy_(self._weights.pop(name))
            assign(target, value, source=0)


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint of a model holds, by name; a tied head is not in it twice."""
    tied = model.all_tied_weights_keys
    return {name: x for name, x in model.state_dict().items() if name not in tied}


def check_model(ours: PreTrainedConfig, theirs: PreTrainedConfig, folder: Path) -> list[str]:
    """Compares the run's model with that of existing weights.

    Returns:
        Messages about settings that differ although the weights fit.

    Raises:
        InputError: the weights do not fit, or are not those of a language model.
    """
    own, other = _described(ours), _described(theirs)
    differing = [k for k in sorted(own.keys() | other.keys()) if own.get(k) != other.get(k)]
    with torch.device("meta"):
        models = [model_class(config)(config) for config in (ours, theirs)]
    if models[1].get_output_embeddings() is None:
        kind = type(models[1]).__name__
        raise InputError(f"model.weights must be a language model's, {folder} is a {kind}")
    shapes = [{name: x.shape for name, x in stored(model).items()} for model in models]
    if shapes[0] != shapes[1]:
        told = "; ".join(f"{k} must be {other.get(k)}, got {own.get(k)}" for k in differing)
        raise InputError(f"model.config is not the model of {folder}: {told}")
    told = "model.config has {0} = {1}, that of the weights has {2}"
    return [told.format(k, own.get(k), other.get(k)) for k in differing]


def check_tokens(folder: Path, data: TokenShards) -> list[str]:
    """Compares the vocabulary of existing weights with that of the data.

    Returns:
        A message if they cannot be compared.

    Raises:
        InputError: a token differs.
    """
    ours, theirs = data.path.parent / "tokenizer", tokenizer_folder(folder)
    if not has_tokenizer(folder) or not (ours / "tokenizer.json").is_file():
        without = data.path.parent if has_tokenizer(folder) else folder
        return [f"{without} has no tokenizer: whether its tokens are the same is not known"]
    if tokenizer_digest(ours) == tokenizer_digest(theirs):
        return []
    own, other = (read_tokenizer(f).get_vocab() for f in (ours, theirs))
    differing = sorted(dict(own.items() ^ other.items()).items(), key=lambda item: item[1])
    if not differing:
        return []
    token = differing[0][0]
    expected, got = (vocabulary.get(token, "no token") for vocabulary in (own, other))
    raise InputError(
        f"{folder} has other tokens than {data.path} ({len(differing):,} differ): "
        f"{token!r} must be {expected}, got {got}"
    )


def _described(model: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that describe the model, with one level of tables flattened."""
    found: dict[str, Any] = {}
    for key, value in model.to_dict().items():
        if key in REMARKS:
            continue
        inner = value if isinstance(value, dict) else {}
        found |= {f"{key}.{k}": v for k, v in inner.items()} if inner else {key: value}
    return found
