"""State files: what a model knows after reading a text, saved so that it can continue later.

A file is in the safetensors format. Its header says which model it belongs to, how many tokens were
read, and the SHA-256 of header and tensors; all of it is checked before a state is given out.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import write_atomic
from .state import SequenceState, StateLayout

FORMAT, VERSION = "rodimus-state", "1"
_KINDS = ("tokens", "recurrent", "convolution", "window")
# Fields of the configuration that decide what a state means.
_ARCHITECTURE = (
    *("block_type", "d_model", "n_layer", "vocab_size", "mixer_cfg", "attn_cfg", "norm_epsilon"),
    *("residual_in_fp32", "use_scale_embedding", "use_norm_embedding"),
)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_state(path: str | Path, state: SequenceState, model: PreTrainedModel) -> None:
    """Write a state to a file; an older file of that name is replaced in one step or not at all.

    Args:
        path: The file to write; its folder must exist.
        state: A state of this model.
        model: The model whose fingerprint the file gets.

    Raises:
        ValueError: the state has other shapes or another dtype than the model's.
        InputError: the file cannot be written, or something else has its name.
    """
    dtype, read = model.get_input_embeddings().weight.dtype, len(state.tokens)
    StateLayout.of(model.config, dtype, max_length=read + 1).check(state)
    # contiguous() would leave a single token its stride, with which it has no view as bytes
    form = {"memory_format": torch.contiguous_format}
    tensors = {kind: getattr(state, kind).cpu().clone(**form) for kind in _KINDS}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(model),
        "config": json.dumps(_architecture(model)),
        "dtype": str(state.convolution.dtype).removeprefix("torch."),
        "tokens": str(len(state.tokens)),
    }
    header["sha256"] = _digest(header, tensors)
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} cannot be written: it is no regular file")
        write_atomic(path, save(tensors, metadata=header))
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def load_state(path: str | Path, model: PreTrainedModel) -> SequenceState:
    """Read the state in a file, on the CPU, after checking that it is intact and of this model.

    Raises:
        InputError: there is no such file, it is damaged or cut short, or another model wrote it.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"expected a state file, got the folder {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_header(path, header, model)
            # shapes are in the header too: nothing is allocated for a file that does not fit
            layout = _check_shapes(path, file, header, model)
            tensors = {kind: file.get_tensor(kind) for kind in _KINDS}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path} is not a state file, or is cut short: {error}") from error
    if _digest(header, tensors) != header.get("sha256"):
        raise InputError(f"{path} is damaged: its content does not have the SHA-256 it states")
    state = SequenceState(**tensors)
    _check_values(path, state, layout, model.config.vocab_size)
    return state


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over every weight's name, shape, dtype, sum of bits and a few of its values.

    Reads all weights once, at memory speed. The digest covers attached adapters, which of PEFT's
    adapters are in use and at what scale, and quantised weights that are not parameters.
    """
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    # a tied head is counted once
    known = {id(parameter) for parameter in parameters.values()}
    others = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) not in known
    }
    for name, value in (*sorted(parameters.items()), *sorted(others.items())):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor):
                _add_tensor(digest, name, part.detach())
    for name, module in model.named_modules():
        # in PEFT's layers it is a flag, in transformers' models a method
        if isinstance(getattr(module, "disable_adapters", None), bool):
            in_use = () if module.disable_adapters else module.active_adapters
            scales = [(key, getattr(module, "scaling", {}).get(key)) for key in in_use]
            digest.update(f"{name} {scales}\n".encode())
    return digest.hexdigest()


def _add_tensor(digest, name, value):
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
    # quantised weights are tensors of other classes, which can be dequantised
    if value.is_quantized or type(value) is not Tensor:
        value = value.dequantize()
    bits = value.view(_BITS[value.element_size()]).flatten()
    some = bits[:: max(bits.numel() // 64, 1)][:64]
    digest.update(f"{int(bits.sum())} {some.tolist()}\n".encode())


def _architecture(model) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in _ARCHITECTURE}


def _digest(header, tensors):
    digest = hashlib.sha256()
    told = {name: value for name, value in header.items() if name != "sha256"}
    digest.update(json.dumps(told, sort_keys=True).encode())
    for kind in _KINDS:
        digest.update(f"{kind} {tuple(tensors[kind].shape)} {tensors[kind].dtype}".encode())
        digest.update(tensors[kind].view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_header(path, header, model):
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is not a state file: its format is {header.get('format')!r}")
    if header.get("version") != VERSION:
        got = header.get("version")
        raise InputError(f"{path} has version {got!r} of the format, expected {VERSION!r}")
    try:
        theirs = dict(json.loads(header["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its header holds no configuration") from error
    # through JSON, like the configuration in the file
    ours = json.loads(json.dumps(_architecture(model)))
    for name in _ARCHITECTURE:
        if theirs.get(name) != ours[name]:
            raise InputError(
                f"{path} is of another model: {name} is {theirs.get(name)}, this model's is"
                f" {ours[name]}"
            )
    if header.get("fingerprint") != fingerprint(model):
        raise InputError(f"{path} is of another model: same architecture, other weights or dtype")


def _check_shapes(path, file, header, model):
    if sorted(file.keys()) != sorted(_KINDS):
        raise InputError(f"{path} must hold {', '.join(_KINDS)}; got {', '.join(file.keys())}")
    shapes = {kind: tuple(file.get_slice(kind).get_shape()) for kind in _KINDS}
    (tokens,) = shapes["tokens"] if len(shapes["tokens"]) == 1 else (0,)
    if not tokens or str(tokens) != header.get("tokens"):
        got = shapes["tokens"]
        raise InputError(f"{path} must hold the {header.get('tokens')} tokens it read, got {got}")
    dtype = getattr(torch, header.get("dtype", ""), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{path} has the unknown dtype {header.get('dtype')!r}")
    layout = StateLayout.of(model.config, dtype, max_length=tokens + 1)
    for kind, (shape, _) in layout.shapes(layout.kept_rows(tokens)).items():
        if shapes[kind] != shape:
            raise InputError(f"{path}: {kind} must have shape {shape}, got {shapes[kind]}")
    return layout


def _check_values(path, state, layout, vocab_size):
    tokens = state.tokens
    if tokens.dtype != torch.int64 or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f"{path}: expected tokens as int64 from 0 to {vocab_size - 1}")
    try:
        layout.check(state)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
