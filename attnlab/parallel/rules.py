"""One table per strategy: logical axis name to mesh axes. Tables of different strategies compose.

A mesh axis of size 1 costs nothing, so ``RULES`` (all of them) is what the trainer uses; which
strategy runs is decided by the sizes of the mesh axes alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnlab.core.axes import Rules
from attnlab.core.errors import MeshError

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "seq", "tensor", "expert")

STRATEGIES: dict[str, Rules] = {
    # Replicated parameters, batch cut over `data`; gradients are all-reduced.
    "dp": {"batch": ("data",)},
    # Parameters and optimizer state cut along D over `fsdp`, gathered a layer at a time.
    "fsdp": {"batch": ("fsdp",), "embed": ("fsdp",)},
    # Heads, MLP columns and vocabulary cut over `tensor` (Shoeybi et al. 2019, arXiv 1909.08053).
    "tp": {
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
    },
}


def combine(names: Iterable[str]) -> Rules:
    """The product of strategies: where two name the same logical axis, it is cut over both."""
    table: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name not in STRATEGIES:
            raise MeshError(f"strategy = {name!r}", "unknown", f"use {', '.join(STRATEGIES)}")
        for axis, mesh_axes in STRATEGIES[name].items():
            table[axis] = table.get(axis, ()) + mesh_axes
    return {a: tuple(sorted(m, key=MESH_AXES.index)) for a, m in table.items()}


RULES: Rules = combine(STRATEGIES)
