"""Tolerances. An implementation may be at most twice as wrong as the reference in the same dtype.

Both are measured against an fp64 oracle, and a rounding band of the dtype is added. Where no
reference run exists, a fixed share of the oracle's largest magnitude is allowed. Errors are largest
absolute differences: one wrong element cannot hide in a mean. Raising a number needs a sentence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """``share`` of the oracle's largest magnitude plus ``floor``; ``band`` in units of rounding."""

    op: float
    output: float
    gradient: float
    floor: float
    band: float


# Layer outputs pass several matmuls, so they get twice an op's share; gradients more again.
TOLERANCES = {
    "float64": Tolerance(1e-12, 1e-12, 1e-11, 1e-13, 4),
    "float32": Tolerance(1e-5, 2e-5, 1e-4, 1e-6, 4),
    "bfloat16": Tolerance(1e-2, 2e-2, 4e-2, 1e-3, 4),
}


def wide(x) -> np.ndarray:
    """``x`` as fp64 on the host."""
    return np.asarray(x).astype(np.float64)


def error(actual, oracle) -> float:
    """Largest absolute difference; infinite where ``actual`` is not finite and the oracle is."""
    a, o = wide(actual), wide(oracle)
    assert a.shape == o.shape, f"shapes differ: {a.shape} and {o.shape}"
    if a.size == 0:
        return 0.0
    empty = np.isneginf(a) & np.isneginf(o)  # the log-sum-exp of an empty row
    difference = np.abs(np.where(empty, 0, a) - np.where(empty, 0, o))
    return float(np.where(np.isfinite(difference), difference, np.inf).max())


def close(
    actual, oracle, reference=None, *, dtype: str = "float32", kind: str = "output", name: str = ""
) -> None:
    """Assert that ``actual`` is within its budget of ``oracle``.

    Args:
        actual, oracle: arrays of one shape. reference: the reference implementation's result in the
            dtype of ``actual``; None takes the fixed share. dtype: what ``actual`` was computed in.
        kind: "op", "output" (of a layer) or "gradient". name: what is compared, for the message.
    """
    tolerance = TOLERANCES[dtype]
    oracle_wide = wide(oracle)
    finite = oracle_wide[np.isfinite(oracle_wide)]
    size = float(np.abs(finite).max()) if finite.size else 0.0
    found = error(actual, oracle)
    if reference is None:
        allowed = getattr(tolerance, kind) * size + tolerance.floor
        rule = f"{getattr(tolerance, kind):.0e} of {size:.3e} + {tolerance.floor:.0e}"
    else:
        own = error(reference, oracle)
        allowed = 2 * own + tolerance.band * float(jnp.finfo(dtype).eps) * size
        rule = f"2 x reference error {own:.3e} + rounding of {size:.3e}"
    assert found <= allowed, (
        f"{name or 'result'} in {dtype}: error {found:.3e} > allowed {allowed:.3e} ({rule})"
    )


def close_trees(
    actual, oracle, reference=None, *, dtype: str = "float32", kind="gradient", name: str = ""
) -> None:
    """``close`` on every leaf; the message names the leaf."""
    flat, tree = jax.tree_util.tree_flatten_with_path(actual)
    others = [None] * len(flat) if reference is None else jax.tree.leaves(reference)
    assert tree == jax.tree.structure(oracle), f"{name}: trees differ"
    for (path, leaf), expected, other in zip(flat, jax.tree.leaves(oracle), others, strict=True):
        close(
            leaf, expected, other, dtype=dtype, kind=kind, name=name + jax.tree_util.keystr(path)
        )


def identical(a, b, name: str = "") -> None:
    """Assert that two trees of arrays agree bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b), f"{name}: trees differ"
    flat = jax.tree_util.tree_flatten_with_path(a)[0]
    for (path, x), y in zip(flat, jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        where = name + jax.tree_util.keystr(path)
        assert x.shape == y.shape and x.dtype == y.dtype, f"{where}: {x.dtype}{x.shape}"
        same = x.tobytes() == y.tobytes()
        assert same, f"{where} differs by up to {error(x, y):.3e}, must be bit for bit the same"
