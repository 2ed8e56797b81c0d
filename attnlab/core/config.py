"""Configs are frozen dataclasses: to JSON and back, and one field changed by name."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from typing import Any

from attnlab.core import registry
from attnlab.core.errors import ConfigError
from attnlab.core.layer import LayerConfig


def to_dict(config: Any) -> Any:
    """A JSON-able form of a config; layer configs carry their ``variant`` name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        if isinstance(config, LayerConfig):
            return {"variant": registry.name_of(type(config)), **fields}
        return fields
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(kind: Any, data: Any, where: str = "config") -> Any:
    """The inverse of ``to_dict`` for a value annotated as ``kind``; ConfigError names the place."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        rest = [a for a in args if a is not type(None)]
        return from_dict(rest[0], data, where)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{where} = {data!r}", "must be a list", "write [a, b]")
        kinds = args[:1] * len(data) if args[-1:] == (...,) else args
        if len(kinds) != len(data):
            rule = f"must have {len(kinds)} entries"
            raise ConfigError(f"{where} = {data!r}", rule, "see --help")
        return tuple(
            from_dict(k, d, f"{where}[{i}]") for i, (k, d) in enumerate(zip(kinds, data))
        )
    if origin is typing.Literal:
        if data not in args:
            raise ConfigError(f"{where} = {data!r}", "unknown value", f"use one of {args}")
        return data
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    return _scalar(kind, data, where)


def _dataclass(kind, data, where):
    if not isinstance(data, dict):
        rule = f"must be the fields of a {kind.__name__}"
        raise ConfigError(f"{where} = {data!r}", rule, "see --help")
    data = dict(data)
    if kind is LayerConfig:
        kind = registry.get(data.pop("variant", "")).config()
    elif issubclass(kind, LayerConfig):
        data.pop("variant", None)
    hints = registry.field_types(kind)
    for name in data:
        if name not in hints:
            near = difflib.get_close_matches(name, hints) or list(hints)
            raise ConfigError(f"{where}.{name}", "is not a field", f"use {' or '.join(near)}")
    given = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        f.name for f in dataclasses.fields(kind)
        if f.name not in data and (f.default, f.default_factory) == given
    ]
    if missing:
        raise ConfigError(where, f"lacks {', '.join(missing)}", "add what is missing")
    return kind(**{n: from_dict(hints[n], d, f"{where}.{n}") for n, d in data.items()})


def _scalar(kind, data, where):
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind in (int, float, str, bool):
        if type(data) is not kind:
            raise ConfigError(
                f"{where} = {data!r}", f"must be of type {kind.__name__}", f"pass a {kind.__name__}"
            )
    return data


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a ``to_dict`` by dotted path; a list of plain values is a leaf."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {path: value}
    out: dict[str, Any] = {}
    for key, item in items:
        out |= flat(item, f"{path}.{key}" if path else str(key))
    return out


def override(config: Any, assignments: list[str]) -> Any:
    """A copy of ``config`` with fields changed by ``"a.b.0.c=value"`` strings.

    Values are Python literals; what is not a literal is a string. Tuples are indexed by number.
    """
    data = to_dict(config)
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {text!r}", "is not NAME=VALUE", "write --set train.steps=100")
        node: Any = data
        keys: list[Any] = list(path.strip().split("."))
        for depth, key in enumerate(keys):
            name = ".".join(keys[: depth + 1])
            if isinstance(node, list):
                if not (key.isascii() and key.isdecimal()) or int(key) >= len(node):
                    raise ConfigError(
                        f"--set {name}", f"there are {len(node)} entries", "use 0, 1, ..."
                    )
                key = int(key)
            elif not isinstance(node, dict) or key not in node:
                known = list(node) if isinstance(node, dict) else []
                near = difflib.get_close_matches(str(key), known) or known or ["a shorter path"]
                raise ConfigError(f"--set {name}", "is not a field", f"use {' or '.join(near)}")
            if depth + 1 == len(keys):
                node[key] = _literal(value.strip())
            else:
                node = node[key]
    return from_dict(type(config), data, type(config).__name__.lower())


def _literal(text: str) -> Any:
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return list(value) if isinstance(value, tuple) else value
