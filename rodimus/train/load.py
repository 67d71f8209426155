"""TOML file -> ``TrainConfig`` -> command-line overrides, and back to TOML.

Strict both ways: an unknown key is an error that suggests the nearest known one, a value of the
wrong type is an error that names both. ``extends = "base.toml"`` names a single parent, whose keys
the child overrides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import re
import tomllib
from itertools import dropwhile
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import InputError
from .config import TrainConfig


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parses one file and its parents; paths in ``model``, and those below ``~``, become absolute.

    Raises:
        InputError: the file is missing, is not TOML, or extends itself.
    """
    return _read(Path(path), ())


def _read(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in children:
        raise InputError(f"{path} extends itself")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        inner = path / "config.toml"
        hint = f"; did you mean {inner}?" if inner.is_file() else ""
        raise InputError(f"cannot read config {path}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    model = values.get("model")
    for key in ("config", "weights"):
        value = model.get(key) if isinstance(model, dict) else None
        if isinstance(value, str) and value:
            model[key] = _beside(path, value, may_be_on_hub=key == "weights")
    data = values.get("data")
    for table, keys in ((values, ("out",)), (data, ("train", "val"))):
        if isinstance(table, dict):
            table.update({key: _at_home(table[key]) for key in keys if key in table})
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise InputError(f"{path}: extends must be one path, got {parent!r}")
    return _merge(_read(path.parent / parent, (*children, path)), values)


def _beside(path: Path, value: str, *, may_be_on_hub: bool) -> str:
    """Makes a path in a file absolute; a hub name is left as it is, unless such a path exists."""
    target = (path.parent / Path(value).expanduser()).resolve()
    if may_be_on_hub and not target.exists():
        from ..loading import is_hub_name

        if is_hub_name(value):
            return value
    return str(target)


def _at_home(value: Any) -> Any:
    """Expands ``~`` in a path or a list of paths: no shell does so for those in a file."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    is_there = isinstance(value, str) and value.startswith("~/")
    return str(Path(value).expanduser()) if is_there else value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    """Fills the dataclass ``cls`` from nested ``values``.

    Raises:
        InputError: an unknown key, with the nearest known one, or a value of the wrong type.
    """
    types = get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        name = prefix + key
        if key not in types:
            raise InputError(f"unknown key {name!r}{_suggest(key, prefix, list(types))}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise InputError(f"{name} must be a table, got {value!r}")
            arguments[key] = build(types[key], value, name + ".")
        else:
            arguments[key] = _convert(name, types[key], value)
    for spec in dataclasses.fields(cls):
        if spec.name not in arguments and dataclasses.is_dataclass(types[spec.name]):
            arguments[spec.name] = build(types[spec.name], {}, prefix + spec.name + ".")
    return cls(**arguments)


def _usable(cls: type, values: Any, prefix: str = "") -> Any:
    """As ``build`` for any values: those of a wrong key or type are left out, and none is checked.
    For help, which also explains files that are no run."""
    made, types = object.__new__(cls), get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        kind, name, value = types[spec.name], prefix + spec.name, spec.default
        given = isinstance(values, dict) and spec.name in values
        if dataclasses.is_dataclass(kind):
            value = _usable(kind, values[spec.name] if given else {}, name + ".")
        elif given:
            with contextlib.suppress(InputError):
                value = _convert(name, kind, values[spec.name])
        object.__setattr__(made, spec.name, value)
    return made


def _suggest(key: str, prefix: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f", did you mean {prefix + near[0]!r}?"
    owner = next(
        (f.name for f in dataclasses.fields(TrainConfig) if key in _field_names(f.name)), None
    )
    if owner:
        return f", did you mean '{owner}.{key}'?"
    return f"; known keys: {', '.join(prefix + k for k in known)}"


def _field_names(section: str) -> set[str]:
    kind = get_type_hints(TrainConfig)[section]
    return {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def _convert(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        item, *others = get_args(kind)
        if not isinstance(value, list):
            raise InputError(f"{name} must be a list, got {value!r}")
        if others != [...] and len(value) != 1 + len(others):
            raise InputError(f"{name} must have {1 + len(others)} entries, got {value!r}")
        return tuple(_convert(f"{name}[{i}]", item, v) for i, v in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and name == "checkpoint.resume" and type(value) is int:
        return str(value)
    if type(value) is not kind:
        raise InputError(f"{name} must be {kind.__name__}, got {type(value).__name__} {value!r}")
    return value


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a run's TOML file and applies ``--section.key value`` overrides.

    Raises:
        InputError: the file, an override or a value in it cannot be used.
        SystemExit: the overrides ask for ``--help``, which is shown for any TOML file.
    """
    values = read_toml(path)
    try:
        config = build(TrainConfig, values)
    except InputError as error:
        if not overrides:
            raise
        if not {"-h", "--help"} & {*overrides}:
            raise InputError(f"{error} (in {path} alone: options change a whole run)") from error
        print(f"{path} is not a whole run: {error}\n")
        config = _usable(TrainConfig, values)
    if not overrides:
        return config
    import tyro

    prog = f"rodimus train {path}"
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                TrainConfig, default=config, args=overrides, prog=prog, description=None
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(told.getvalue())) from stop


# Unicode box-drawing characters, or the ASCII lines that a plain locale gets
_FRAME = re.compile("[\u2500-\u257f]+|-{4,}|^[|+]|[|+]$")


def _one_line(box: str) -> str:
    """tyro's error box as one line: the first paragraph below its title and a suggested option."""
    rows = [_FRAME.sub("", row.strip()).strip() for row in box.strip().splitlines()[1:]]
    rows = list(dropwhile(lambda row: not row, rows))
    end = rows.index("") if "" in rows else len(rows)
    # our own checks name the option already
    message = re.sub(r"^Error parsing \w+: (?=\w+\.)", "", " ".join(rows[:end]))
    near = re.search(r"Perhaps you meant:\s+(--\S+)", " ".join(rows))
    suggestion = f", did you mean {near[1]}?" if near else ""
    return (message or " ".join(box.split())) + suggestion


def to_toml(config: TrainConfig) -> str:
    """The resolved run as a TOML file that ``load_config`` reads back to an equal value."""
    tables, lines = [], []
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            tables += ["", f"[{key}]", *(f"{k} = {_literal(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key} = {_literal(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(_literal(v) for v in value)}]"
    # JSON writes numbers, booleans and strings as TOML does, except for surrogates and DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
