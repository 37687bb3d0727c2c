"""Typed settings: dataclasses filled from plain YAML, with bounds and errors that name the key.

A settings class is a dataclass whose fields are made by `setting`. `build` fills it from a mapping;
an unknown key, a wrong type or a value out of bounds is a one-line `UsageError`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from kestrel.errors import UsageError, unknown

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `yes`, `no`, `on`, `off` are words (they are keywords to spot), `1e-3` is a number."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_FLOAT = re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` or a reader of YAML 1.1 would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _check_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"{node.start_mark.name}: key {key!r} stands twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _check_duplicates)


def parse_yaml(text: str, name: str = "value") -> Any:
    """Parse YAML text. Raises UsageError with the place of a syntax error."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{place}: not valid YAML ({getattr(error, 'problem', error)})") from None
    finally:
        loader.dispose()


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping (an empty file is an empty mapping)."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: expected a mapping of keys to values")
    return data


def dump_yaml(data: Any) -> str:
    """Plain YAML in the order of the keys; words such as `yes` are quoted, so every YAML reader agrees."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def setting(default: Any, help: str, *, min: float | None = None, max: float | None = None) -> Any:
    """A dataclass field with a help text and optional inclusive bounds (of each item, for lists)."""
    metadata = {"help": help, "min": min, "max": max}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _type_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(a) for a in args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind))


def _convert(value: Any, kind: Any, where: str, metadata: dict) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        for option in rest[:-1]:
            try:
                return _convert(value, option, where, metadata)
            except UsageError:
                continue
        return _convert(value, rest[-1], where, metadata)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        if isinstance(value, str) and all(isinstance(a, str) for a in args):
            raise unknown(f"value of {where}", value, args)
        raise UsageError(f"{where}: expected one of {', '.join(str(a) for a in args)}, not {value!r}")
    if origin is list:
        if isinstance(value, str):
            value = [parse_yaml(part.strip(), where) for part in value.split(",")] if value.strip() else []
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list):
            raise UsageError(f"{where}: expected a list, not {value!r}")
        return [_convert(item, args[0], f"{where}[{i}]", metadata) for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where}: expected a mapping, not {value!r}")
        return {str(k): _convert(v, args[1], f"{where}.{k}", metadata) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{where}: expected {_type_name(kind)}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where}: {value} is not a finite number")
    low, high = metadata.get("min"), metadata.get("max")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and ((low is not None and value < low) or (high is not None and value > high)):
        bounds = f">= {low:g}" if high is None else f"<= {high:g}" if low is None else f"{low:g}..{high:g}"
        raise UsageError(f"{where}: {value} is out of bounds ({bounds})")
    return value


def build(cls: type[T], data: Any, where: str = "") -> T:
    """Fill the settings class `cls` from the mapping `data`; `where` is the key prefix used in errors."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{where or 'configuration'}: expected a mapping of keys to values, not {data!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init}
    prefix = f"{where}." if where else ""
    values = {}
    for key, value in data.items():
        if key not in fields:
            raise unknown("key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
        values[key] = _convert(value, hints[key], f"{prefix}{key}", dict(fields[key].metadata))
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where or 'configuration'}: {error}") from None


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain types, in the order of the fields."""
    return dataclasses.asdict(settings)


def merge(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """`base` with `delta` laid over it: mappings merge, everything else is replaced. Neither is changed."""
    merged = dict(base)
    for key, value in delta.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_assignment(text: str) -> dict[str, Any]:
    """`a.b=value` as a nested mapping; the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        raise UsageError(f"--set {text!r}: expected key.sub=value")
    nested: Any = value if re.fullmatch(r"[\w-]+(\s*,\s*[\w.-]+)+", value) else parse_yaml(value, f"--set {key}")
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def describe(cls: type, values: Any, where: str = "") -> list[tuple[str, str, str]]:
    """(key, current value, help) of every setting below `values`, an instance of `cls`."""
    rows: list[tuple[str, str, str]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        key = f"{where}.{field.name}" if where else field.name
        value = getattr(values, field.name)
        if dataclasses.is_dataclass(value):
            rows += describe(type(value), value, key)
        else:
            shown = (
                "null" if value is None else ("true" if value else "false") if isinstance(value, bool) else str(value)
            )
            rows.append((key, shown, f"{field.metadata.get('help', '')} [{_type_name(hints[field.name])}]"))
    return rows
