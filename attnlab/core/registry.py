"""The registry: one row a variant. A new variant = its layer file, a row here, a case in tests."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from attnlab.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: name, where its config class lives, what it is, and the paper it comes from."""

    name: str
    path: str
    summary: str
    paper: str

    def config(self) -> type:
        """The config class (imports the layer)."""
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)


_ROWS = (
    Variant(
        "gqa", "attnlab.layers.gqa:GQAConfig",
        "grouped-query attention; MHA and MQA are configs of it",
        "Ainslie et al. 2023, arXiv 2305.13245",
    ),
    Variant(
        "sqa", "attnlab.layers.sqa:SQAConfig",
        "sparse query attention: fewer query heads, the whole family",
        "Filipek 2025, arXiv 2510.01817",
    ),
    Variant(
        "mla", "attnlab.layers.mla:MLAConfig",
        "multi-head latent attention: one low-rank latent a token is cached",
        "DeepSeek-AI 2024, arXiv 2405.04434",
    ),
    Variant(
        "cca", "attnlab.layers.cca:CCAConfig",
        "compressed convolutional attention (CCA, CCGQA): attention inside a compressed space",
        "Figliolia et al. 2025, arXiv 2510.04476",
    ),
)

VARIANTS: Mapping[str, Variant] = {row.name: row for row in _ROWS}


def get(name: str) -> Variant:
    """The row of ``name``; ConfigError with the nearest names if there is none."""
    if name in VARIANTS:
        return VARIANTS[name]
    near = difflib.get_close_matches(name, VARIANTS) or list(VARIANTS)
    raise ConfigError(f"variant = {name!r}", "is not registered", f"use {' or '.join(near)}")


def name_of(cls: type) -> str:
    """The registered name of a config class."""
    for row in VARIANTS.values():
        if row.path == f"{cls.__module__}:{cls.__name__}":
            return row.name
    raise ConfigError(
        f"{cls.__module__}:{cls.__name__}", "is not registered", "add a row to core/registry.py"
    )


def build_config(name: str, **fields: Any) -> Any:
    """The config of variant ``name`` with these fields; unknown fields are refused by name."""
    cls = get(name).config()
    known = [f.name for f in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known) or known
            raise ConfigError(
                f"{cls.__name__}.{field}", "is not a field", f"use {' or '.join(near)}"
            )
    return cls(**fields)


def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of every dataclass field (for reading values from the command line)."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}
