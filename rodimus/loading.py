"""Finds checkpoint folders, checks them before anything is built, and loads them.

It reads folders in the released format (also ours), those of flash-linear-attention's Rodimus,
which are converted while loading, the folders of training runs, and those of the peers.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from . import convert, register
from .configuration_rodimus import RodimusConfig
from .errors import InputError, first_line
from .modeling_rodimus import (
    RodimusForCausalLM,
    RodimusForSequenceClassification,
    RodimusModel,
)
from .peers import PEERS
from .run_folder import is_run, read_weights, sound_checkpoint, step_number

MODELS = {
    "RodimusForCausalLM": RodimusForCausalLM,
    "RodimusForSequenceClassification": RodimusForSequenceClassification,
    "RodimusModel": RodimusModel,
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TEXT_FILES = ["*.json", "*.jinja"]
# Checkpoints of earlier steps that transformers' Trainer keeps.
_NOT_FROM_HUB = ["checkpoint-*/*"]


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is ``owner/name`` or ``owner/name@revision``, as on the hub, and nothing here
    has that path."""
    try:
        is_here = Path(name).exists()
    except OSError:
        # permission is denied, or the name is too long
        is_here = True
    return bool(_HUB_NAME.fullmatch(str(name))) and not is_here


def split_hub_name(name: str) -> tuple[str, str | None]:
    """``(owner/name, revision)`` of a name on the hub; the revision is None for the newest."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: the path itself, or the download of a name on the hub.

    Raises:
        InputError: there is no such folder, it may not be read, or it is neither a model's nor a
            training run's.
    """
    folder = Path(name).expanduser()
    if is_hub_name(name):
        folder = _download(str(name))
    try:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {what}: expected a checkpoint folder (with config.json)")
        if not (folder / "config.json").is_file() and not is_run(folder):
            raise InputError(_why_no_checkpoint(folder))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error
    return folder


def _why_no_checkpoint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is an adapter: merge it into its model (PEFT's merge_and_unload), save that"
            " and name its folder"
        )
    run = folder.absolute().parent.parent
    if step_number(folder) is not None and is_run(run):
        return (
            f"{folder} is a checkpoint of a run: name {run}, or make it a model of its own with"
            f" `rodimus export {run} OUT --step {step_number(folder)}`"
        )
    return f"{folder} holds no config.json: not a checkpoint folder"


def _download(name: str, *, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download

    repository, revision = split_hub_name(name)
    options = {"revision": revision, "ignore_patterns": _NOT_FROM_HUB}
    wanted = [*_TEXT_FILES, "*.safetensors"] if weights else _TEXT_FILES
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted, **options))
        if weights and not any(folder.glob("*.safetensors")):
            wanted = [*_TEXT_FILES, "pytorch_model*.bin"]
            folder = Path(snapshot_download(repository, allow_patterns=wanted, **options))
    except Exception as error:  # the hub's client raises many classes, network errors among them
        message = f"no folder {name!r} here, and the hub does not give it: {first_line(error)}"
        raise InputError(message) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def load_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint folder in any of the formats.

    Raises:
        InputError: as ``read_config``.
    """
    return read_config(folder / ("model.json" if is_run(folder) else "config.json"))


def read_config(path: Path) -> PreTrainedConfig:
    """A model's configuration: ours, that of flash-linear-attention's Rodimus, or a peer's.

    Raises:
        InputError: the file is none of these, or one of its values is wrong.
    """
    from huggingface_hub.errors import StrictDataclassError

    fields = read_json(path)
    kind = fields.get("model_type", "rodimus")
    known = ("rodimus", *PEERS)
    if kind not in known:
        raise InputError(f"{path}: model_type must be one of {', '.join(known)}, got {kind!r}")
    if not fields.keys() & {"d_model", "hidden_size"}:
        raise InputError(f"{path} is not the configuration of a model: it has no d_model")
    try:
        if kind in PEERS:
            return PEERS[kind][0].from_dict(fields)
        if convert.is_fla_config(fields):
            fields = convert.config_from_fla(fields)
        return RodimusConfig.from_dict(fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        # StrictDataclassError, from transformers' type checks, has several lines
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a configuration's language model, or another of ours that it names."""
    if config.model_type in PEERS:
        return PEERS[config.model_type][1]
    return MODELS.get((config.architectures or [""])[0], RodimusForCausalLM)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, all present and, where that can be checked, complete. As in
    transformers, a single file takes precedence over an index of several.

    Raises:
        InputError: there are none, one of several is missing, or one is cut short.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            files = [folder / name]
        elif index.is_file():
            files = _files_of_index(index)
        else:
            continue
        for file in files:
            _check_complete(file)
        return files
    raise InputError(f"{folder} holds no weights: expected {' or '.join(WEIGHT_FILES)}")


def _files_of_index(index: Path) -> list[Path]:
    files = read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index}: expected weight_map, a file for each weight, got {files!r:.99}")
    return [index.parent / file for file in sorted(set(names))]


def _check_complete(file: Path) -> None:
    if not file.is_file():
        raise InputError(f"{file} is missing: the index beside it names it")
    if file.suffix != ".safetensors":
        return
    try:
        # opened first, because safetensors reports a file without read permission as missing
        with file.open("rb"), safe_open(file, framework="pt"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except SafetensorError as error:
        size = file.stat().st_size
        message = f"{file} is damaged or cut short ({size:,} bytes; {error}): copy it again"
        raise InputError(message) from error


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    step: int | None = None,
    weight_dtype: str | None = None,
) -> PreTrainedModel:
    """The model in a checkpoint folder, in evaluation mode.

    Args:
        name: a folder in the released format or in flash-linear-attention's, the folder of a
            training run, or a name on the hub.
        dtype: the dtype to load the weights in; ``"auto"`` keeps the one they were saved in.
        device: where to put the weights; default the CPU.
        weight_dtype: ``"int8"`` rounds the matrices of all linear layers to 8 bits, one scale per
            output; ``"int4"`` rounds those within the blocks to 4 bits, one scale per 32 inputs.
        step: which checkpoint of a training run; default the newest complete one.

    Raises:
        InputError: a file is missing, damaged, or disagrees with ``config.json``.
    """
    folder = checkpoint_folder(name)
    if step is not None and not is_run(folder):
        raise InputError(f"{folder} is one model, not a training run: it has no step {step}")
    config = load_config(folder)
    # a package that was imported after this one may have taken over the model type
    register()
    quantize = quantizer(weight_dtype)
    if is_run(folder):
        model = _load_run(config, sound_checkpoint(folder, step), dtype)
    else:
        files = weight_files(folder)
        if config.model_type == "rodimus" and convert.is_fla_config(
            read_json(folder / "config.json")
        ):
            model = _load_fla(config, files, dtype)
        else:
            model = _load_released(config, folder, files, dtype)
    model = model.to(device) if device is not None else model
    quantize(model)
    return model.eval()


def quantizer(weight_dtype: str | None) -> Callable[[PreTrainedModel], None]:
    """The function that rounds a model's linear layers in place for ``load_model``, which asks for
    it before any weight is read.

    Raises:
        InputError: the dtype is another one, or torchao is missing.
    """
    if weight_dtype is None:
        return lambda model: None
    if weight_dtype not in ("int8", "int4"):
        raise InputError(f"weight_dtype must be None, 'int8' or 'int4', got {weight_dtype!r}")
    try:
        from .quantization import round_to_int4, round_to_int8
    except ImportError as error:
        raise InputError(
            f"weights in {weight_dtype} need torchao (pip install torchao): {first_line(error)}"
        ) from error
    return round_to_int8 if weight_dtype == "int8" else round_to_int4


def load_rodimus(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    weight_dtype: str | None = None,
) -> RodimusForCausalLM:
    """As ``load_model``, for the engine, which runs Rodimus and Rodimus+ alone.

    Raises:
        InputError: as ``load_model``, or it is another model.
    """
    model = load_model(name, dtype=dtype, device=device, weight_dtype=weight_dtype)
    if not isinstance(model, RodimusForCausalLM):
        kind = type(model).__name__
        raise InputError(f"expected a Rodimus language model, {name} is a {kind}")
    return model


def _load_released(
    config: PreTrainedConfig, folder: Path, files: list[Path], dtype
) -> PreTrainedModel:
    cls = model_class(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes |= {tensor: shape for tensor, (shape, _) in _headers(file).items()}
    # quantised weights have names and shapes of their own
    if getattr(config, "quantization_config", None) is None:
        _check_shapes(folder, cls, config, shapes)
    return cls.from_pretrained(folder, config=config, dtype=dtype)


def stored_dtypes(folder: Path) -> set[str]:
    """Names of the dtypes that a checkpoint folder keeps its weights in: safetensors' name for any
    but torch's usual floating-point dtypes.

    Raises:
        InputError: as ``weight_files``.
    """
    if is_run(folder):
        return {"float32"}
    return {dtype for file in weight_files(folder) for _, dtype in _headers(file).values()}


def _headers(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names of the tensors in a file, with shape and dtype, from its header alone."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {
                name: (tuple(x.get_shape()), _DTYPES.get(x.get_dtype(), x.get_dtype()))
                for name, x in slices.items()
            }
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise InputError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{file} must hold tensors by name, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            got = f"{type(tensor).__name__} by the name {name!r}"
            raise InputError(f"{file} must hold tensors by name, got {got}")
    return {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
    }


def _check_shapes(
    folder: Path,
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    got: dict[str, tuple[int, ...]],
) -> None:
    with torch.device("meta"):
        model = cls(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = set(model.all_tied_weights_keys)
    where = f"{folder}: the weights do not fit config.json:"
    for name in got:
        if name not in expected:
            raise InputError(f"{where} it gives a model without {name}")
        if got[name] != expected[name]:
            raise InputError(f"{where} {name} must be {expected[name]}, got {got[name]}")
    for name in expected:
        if name not in got and name not in optional:
            raise InputError(f"{where} {name} is missing")


def _load_run(config: PreTrainedConfig, checkpoint: Path, dtype) -> PreTrainedModel:
    cls = model_class(config)
    with torch.device("meta"):
        model = cls(config)
    weights = {
        name: torch.empty(tensor.shape, dtype=torch.float32)
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    read_weights(checkpoint, weights)
    dtype = torch.float32 if dtype == "auto" else dtype
    return cls.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _load_fla(config: RodimusConfig, files: list[Path], dtype) -> PreTrainedModel:
    weights = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise InputError(f"{file}: only safetensors are converted from flash-linear-attention")
        weights |= load_file(file)
    try:
        weights = convert.weights_from_fla(weights)
    except ValueError as error:
        raise InputError(f"{files[0].parent}: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    _check_shapes(files[0].parent, RodimusForCausalLM, config, shapes)
    if dtype == "auto":
        dtype = weights["model.embeddings.weight"].dtype
    model = RodimusForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    folder = files[0].parent
    if (folder / GENERATION_CONFIG_NAME).is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError as error:
            raise InputError(f"{folder}: {first_line(error)}") from error
    return model


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a checkpoint folder.

    Raises:
        InputError: as ``read_tokenizer``.
    """
    return read_tokenizer(tokenizer_folder(checkpoint_folder(name)))


def find_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's or run's folder, which may lack weights, or of a name on the hub.

    Raises:
        InputError: as ``read_tokenizer``, or it cannot be downloaded.
    """
    folder = Path(name).expanduser()
    if is_hub_name(name):
        folder = _download(str(name), weights=False)
    return read_tokenizer(tokenizer_folder(folder))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with or without a model beside it.

    Raises:
        InputError: the folder holds none, or its files cannot be read.
    """
    if not (folder / TOKENIZER_FILES[0]).is_file():
        # where `rodimus data pack` puts it
        inner = folder / "tokenizer"
        hint = f"; did you mean {inner}?" if (inner / TOKENIZER_FILES[0]).is_file() else ""
        raise InputError(f"{folder} holds no tokenizer: expected {TOKENIZER_FILES[0]}{hint}")
    # if unregistered, transformers would ask whether to run the code in an exported folder
    register()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust parser raises bare exceptions
        message = f"{folder}: the tokenizer cannot be read: {first_line(error)}"
        raise InputError(message) from error


def end_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[int]:
    """Tokens that end a text: those of the model's generation config, and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ends = list(configured) if isinstance(configured, list | tuple) else [configured]
    if tokenizer is not None:
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(token for token in ends if token is not None))


def tokenizer_folder(folder: Path) -> Path:
    """Where a checkpoint folder keeps its tokenizer."""
    return folder / "tokenizer" if is_run(folder) else folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder carries a tokenizer."""
    return (tokenizer_folder(folder) / TOKENIZER_FILES[0]).is_file()


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is the GPU where there is one.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    # torch keeps eight bits of a number: cuda:256 would be cuda:0
    if device.type not in ("cpu", "cuda") or str(device) != name:
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        seen = f"only {found}" if found else "no GPU"
        raise InputError(f"--device {name}: torch {torch.__version__} sees {seen} here")
    return device


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: the size a model needs, even if ids in between are unused."""
    return max(tokenizer.get_vocab().values()) + 1
