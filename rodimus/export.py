"""``rodimus export CKPT OUT``: a folder that loads with torch and transformers alone.

Besides weights, configuration and tokenizer, the folder carries the code of the model, so that
``AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)`` needs no package of ours.
Where ``rodimus_kernels`` is installed, the same code uses its kernels; where ``rodimus`` is
imported, its classes win over the copies. The code is copied as it stands, never transformed.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from .configuration_rodimus import RodimusConfig
from .errors import InputError, first_line
from .loading import (
    checkpoint_folder,
    has_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
)
from .modeling_rodimus import RodimusForCausalLM
from .peers import PEERS

AUTO_MAP = {
    "AutoConfig": "configuration_rodimus.RodimusConfig",
    "AutoModel": "modeling_rodimus.RodimusModel",
    "AutoModelForCausalLM": "modeling_rodimus.RodimusForCausalLM",
    "AutoModelForSequenceClassification": "modeling_rodimus.RodimusForSequenceClassification",
}

_SUFFIXES = {".json", ".jinja", ".model", ".safetensors"}


def export(
    checkpoint: str | Path, out: str | Path, *, step: int | None = None, overwrite: bool = False
) -> Path:
    """Write a checkpoint as a self-contained folder; an old one stays until the new is complete.

    Args:
        checkpoint: any folder that :func:`rodimus.loading.load_model` reads.
        out: the folder to write.
        step: which checkpoint of a training run; default the newest complete one.
        overwrite: replace ``out`` if it is an exported model, or an empty folder.

    Returns:
        The folder written.

    Raises:
        InputError: the checkpoint cannot be read, its weights are quantised, or ``out`` cannot be
            written, or exists and may not be replaced.
    """
    out = Path(out).expanduser().resolve()
    folder = checkpoint_folder(checkpoint)
    try:
        if out.exists():
            _check_replaceable(out, folder, overwrite)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error
    if getattr(load_config(folder), "quantization_config", None) is not None:
        raise InputError(f"{folder} holds quantised weights: export those they were made from")
    model = load_model(folder, step=step)
    if isinstance(model, RodimusForCausalLM) and has_tokenizer(folder):
        # a classifier made from the export needs one for batches; nothing else does
        if model.config.pad_token_id is None:
            model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    try:
        with _replacing(out) as temporary:
            write_model(model, temporary)
            if has_tokenizer(folder):
                write_tokenizer(folder, temporary)
            # another process may have created it in the meantime
            if out.exists():
                _check_replaceable(out, folder, overwrite)
    # the writer of the weights raises SafetensorError for a full disk
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {first_line(error)}") from error
    return out


def _check_replaceable(out: Path, source: Path, overwrite: bool) -> None:
    """Raise InputError unless replacing ``out`` destroys nothing but an earlier export."""
    # the replacement is a new folder, to which neither a mount nor the current folder moves
    if out.is_mount() or out.samefile("."):
        what = "a mount point" if out.is_mount() else "the current folder"
        raise InputError(f"{out} is {what}, which cannot be replaced: name a folder in it")
    if not overwrite:
        raise InputError(f"{out} exists already: remove it, or pass --overwrite")
    if source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} holds the checkpoint to export: expected another folder")
    found = sorted(out.iterdir()) if out.is_dir() else [out]
    others = [path.name for path in found if not _is_written(path)]
    why = f"it holds {others[0]}" if others else _why_foreign(out / "config.json")
    if found and why:
        raise InputError(
            f"{out} is no exported model ({why}), so it is not replaced: remove it yourself"
        )


def _why_foreign(config: Path) -> str | None:
    """Why no export can have written this file, or None."""
    try:
        kind = json.loads(config.read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return "it holds no readable config.json"
    known = (RodimusConfig.model_type, *PEERS)
    return None if kind in known else f"its config.json is of the model_type {kind!r}"


def _is_written(path: Path) -> bool:
    """Whether an export may have written this entry of its folder."""
    if path.name == CHAT_TEMPLATE_DIR and path.is_dir():
        return all(file.suffix == ".jinja" for file in path.iterdir())
    names = {"merges.txt", "vocab.txt", *(name for _, name in code_files())}
    return path.is_file() and (path.name in names or path.suffix in _SUFFIXES)


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Save the weights, the configuration with its ``auto_map``, and the code that this names.

    A peer is saved without code, because its code belongs to other packages.
    """
    if model.config.model_type in PEERS:
        model.save_pretrained(folder)
        return
    model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(folder)


def copy_code(folder: str | Path) -> None:
    """Copy the files that ``AUTO_MAP`` names, and those that they import."""
    for source, name in code_files():
        shutil.copyfile(source, Path(folder) / name)


def code_files() -> list[tuple[Path, str]]:
    """Each file of the exported code and its name in the folder."""
    here = Path(__file__).parent
    # found, not imported: the operators need not be importable to be copied
    operators = importlib.util.find_spec("rodimus_kernels")
    if operators is None or not operators.submodule_search_locations:
        raise InputError("rodimus_kernels is not installed; an export carries its reference.py")
    reference = Path(operators.submodule_search_locations[0]) / "reference.py"
    own = ("configuration_rodimus.py", "modeling_rodimus.py")
    return [*((here / name, name) for name in own), (reference, "reference_rodimus.py")]


def write_tokenizer(source: Path, folder: Path) -> None:
    """Save the tokenizer, declared as transformers' own class so that it loads without our code."""
    load_tokenizer(source).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "RodimusTokenizer":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that replaces it if the block succeeds and is deleted otherwise. The
    old content of ``out`` is removed last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    written, before = temporary / "new", temporary / "old"
    written.mkdir()
    try:
        yield written
        _make_readable(written)
        if out.exists():
            os.replace(out, before)
        os.replace(written, out)
    finally:
        if before.exists() and not out.exists():
            try:
                os.replace(before, out)
            except OSError as error:
                raise InputError(
                    f"cannot write {out}: {first_line(error)}; what was there is now {before}"
                ) from error
        shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Set the permissions of new files: temporary folders and safetensors' files are private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
