"""Logical axes: parameters, caches and activations name theirs, one table maps names to the mesh.

Names: parameters use ``embed`` (D), ``heads`` (N), ``kv_heads`` (K), ``head`` (H or V), ``latent``
(R), ``mlp``, ``vocab``, ``experts``, ``layers`` (stacked); activations use ``batch``, ``time``,
``width`` (D), ``heads``, ``kv_heads``, ``mlp``, ``vocab``. A name without a rule is replicated.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnlab.core.errors import ConfigError, MeshError

Axes = tuple[str | None, ...]
WIDTH: Axes = ("batch", "time", "width")  # of activations [B, T, D]
HEADS: Axes = ("batch", "time", "heads", None)  # of queries [B, T, N, H]
KV_HEADS: Axes = ("batch", "time", "kv_heads", None)  # of keys and values [B, T, K, H]
Rules = Mapping[str, tuple[str, ...]]

_context: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "attnlab_sharding", default=None
)


def normal(std: float):
    """Initialiser: zero-mean normal of standard deviation ``std``."""
    return jax.nn.initializers.normal(std)


def parameter(rngs: nnx.Rngs, init, shape: Sequence[int], axes: Axes, dtype) -> nnx.Param:
    """A parameter that carries its logical axes as one inert metadata key."""
    shape = tuple(shape)
    assert len(shape) == len(axes), (shape, axes)
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ConfigError(
            f"precision.params = {dtype!r}", "this jax has 64-bit types switched off",
            'call jax.config.update("jax_enable_x64", True) first, or use "float32"',
        )
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


def zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


def spec(
    axes: Axes, rules: Rules, mesh: Mesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The partition of an array with these axes; a mesh axis is used once, left to right.

    With its ``shape``, a dimension of 1 (the one key/value head of MQA) is replicated.
    """
    used: set[str] = set()
    parts: list[Any] = []
    for i, name in enumerate(axes):
        whole = shape is not None and shape[i] == 1
        wanted = rules.get(name, ()) if name and not whole else ()
        free = tuple(a for a in wanted if a in mesh.axis_names and a not in used)
        used.update(free)
        parts.append(None if not free else free[0] if len(free) == 1 else free)
    return PartitionSpec(*parts)


def check_divisible(name: str, shape: Sequence[int], part: PartitionSpec, mesh: Mesh) -> None:
    """Raise MeshError if a dimension cannot be cut into the shards its partition asks for."""
    for size, entry in zip(shape, part, strict=False):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        shards = math.prod(mesh.shape[a] for a in names)
        if size % shards:
            raise MeshError(
                f"{name} has a dimension of {size}",
                f"it is cut over mesh axes {names} into {shards} shards, which do not divide it",
                "change the mesh axis or the model size",
            )


@contextlib.contextmanager
def sharding(mesh: Mesh, rules: Rules):
    """Inside, ``constrain`` pins activations to the mesh; outside it does nothing.

    It acts while a function is traced. ``jax.jit`` does not see it: a function that was traced
    outside keeps that trace, so jit it inside, or name the mesh in a static argument.
    """
    token = _context.set((mesh, rules))
    try:
        yield
    finally:
        _context.reset(token)


def current() -> tuple[Mesh, Rules] | None:
    """The mesh and rules of the enclosing ``sharding`` block."""
    return _context.get()


def mesh_to_cut() -> Mesh | None:
    """The mesh over whose devices arrays still have to be cut; None without one, on one device, and
    inside ``shard_map``, where a device's part is at hand."""
    context = _context.get()
    mapped = bool(jax.sharding.get_abstract_mesh().manual_axes)
    return None if context is None or context[0].size == 1 or mapped else context[0]


def cut(axis: str, size: int) -> tuple[str, ...]:
    """The mesh axes over which the enclosing ``sharding`` block cuts ``size`` entries of an axis.

    Empty without a mesh, and where the mesh does not divide ``size`` (a batch of one while
    generating): such an axis stays whole.
    """
    context = _context.get()
    if context is None:
        return ()
    mesh, rules = context
    names = tuple(a for a in rules.get(axis, ()) if a in mesh.axis_names)
    return names if size % math.prod(mesh.shape[a] for a in names) == 0 else ()


def cut_heads(N: int, K: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that cut ``N`` query heads and ``K`` key/value heads where rows and heads stay
    apart: alike or not at all; a single key/value head goes to every device."""
    heads = cut("heads", N)
    if K == 1:
        return heads, ()
    heads = heads if cut("kv_heads", K) == heads else ()
    return heads, heads


def shards(axis: str, size: int) -> int:
    """Into how many shards the enclosing ``sharding`` block cuts ``size`` entries of an axis."""
    context = _context.get()
    return 1 if context is None else math.prod(context[0].shape[a] for a in cut(axis, size))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh by its logical axes; the identity without a mesh.

    An axis whose size the mesh does not divide stays unpinned.
    """
    context = _context.get()
    if context is None:
        return x
    mesh, rules = context
    fitted = []
    for size, entry in zip(x.shape, spec(axes, rules, mesh), strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        fits = size % math.prod(mesh.shape[a] for a in names) == 0
        fitted.append(entry if fits else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fitted)))


def varying(x: Any) -> frozenset[str]:
    """The mesh axes over which an array differs inside ``shard_map``."""
    kind: Any = jax.typeof(x)
    return kind.manual_axis_type.varying


def vary(tree: Any) -> Any:
    """Give all arrays the same varying axes inside shard_map, as scans and cond branches require.

    The transpose of the cast is the sum over those axes that a replicated input's gradient needs.
    """
    axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(tree)))

    def cast(x):
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
