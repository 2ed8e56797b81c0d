"""attnlab, the attention laboratory for JAX.

A table of contents: a name is imported when it is asked for, so ``import attnlab`` alone does not
even import jax.
"""

from __future__ import annotations

import importlib
from typing import Any

_CONTENTS: dict[str, tuple[str, ...]] = {
    "attnlab.layers.gqa": ("GQA", "GQAConfig"),
    "attnlab.layers.sqa": ("SQA", "SQAConfig"),
    "attnlab.layers.mla": ("MLA", "MLAConfig"),
    "attnlab.layers.cca": ("CCA", "CCAConfig"),
    "attnlab.ops.attention": ("attention",),
    "attnlab.core.types": ("Out", "Precision", "Seq"),
    "attnlab.core.mask": (
        "Blocks", "Causal", "Full", "MaskMod", "Prefix", "Segments", "SinkTokens", "Window",
    ),
    "attnlab.core.rope": ("Rope", "Yarn"),
    "attnlab.core.registry": ("build_config",),
    "attnlab.models.decoder": ("Decoder", "DecoderConfig"),
    "attnlab.models.presets": ("preset",),
    "attnlab.infer.generate": ("generate",),
    "attnlab.convert.linen": ("to_linen",),
}

# Names that differ from the attribute behind them; no attribute means the module itself.
_RENAMED: dict[str, tuple[str, str | None]] = {
    "variants": ("attnlab.core.registry", "VARIANTS"),
    "errors": ("attnlab.core.errors", None),
}

_WHERE: dict[str, tuple[str, str | None]] = _RENAMED | {
    name: (module, name) for module, names in _CONTENTS.items() for name in names
}

__all__ = [*sorted(_WHERE), "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _WHERE:
        raise AttributeError(f"module 'attnlab' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = importlib.import_module(module)
    value = value if attribute is None else getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("attnlab")
    except metadata.PackageNotFoundError:
        return "0+source"  # a checkout on the path, not installed
