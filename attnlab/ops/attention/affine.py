"""Modified scores with as little work a pair as their form allows.

On a tile every operation costs one slot of the vector unit a pair, vectors beside it next to
nothing. So the value of a body (``core.staging``) is kept as ::

    z = factor * tile + scalar + row + column

for as long as its steps are sums and products with numbers: ``cap * tanh(s * scale / cap) + slope *
(k - q)`` takes two products and one sum a pair, in place of six operations. Factors meet before
they meet the tile, and the difference of two places is no tile but a row and a column; both count
from one place near the tile's queries, so that the sum of the two rounds like their difference.

Softmax does not see what is added to a whole row. ``row`` is therefore left to the caller, who owes
it to the log-sum-exp. In a mask, ``q - k >= c`` is one comparison of ``q`` with ``k + c``.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnlab.core.staging import Body, apply, operand

Lift = Callable[[Any, str, str], Any]
KEPT = frozenset("add add_any sub mul div neg".split())
COMPARED = frozenset("ge gt le lt eq ne".split())


@dataclasses.dataclass(frozen=True)
class Sum:
    """``factor * tile + scalar + row + column``; ``tile`` may be None, and ``more`` empty."""

    tile: Any
    factor: Any
    more: dict[str, Any]

    @property
    def places(self) -> bool:
        """Whether it is a row and a column of integers."""
        row = self.more.get("row")
        whole = row is not None and row.dtype == jnp.int32
        return self.tile is None and whole and "column" in self.more

    def scaled(self, c: Any, lift: Lift) -> Sum:
        """Times a number."""
        more = {rank: _times(x, c, rank, lift) for rank, x in self.more.items()}
        return Sum(self.tile, self.factor * c, more)

    def plus(self, other: Sum, lift: Lift) -> Sum:
        tile, factor = self.tile, self.factor
        if tile is None:
            tile, factor = other.tile, other.factor
        elif other.tile is not None:
            tile, factor = self._product(lift) + other._product(lift), 1.0
        more = dict(self.more)
        for rank, x in other.more.items():
            more[rank] = more[rank] + x if rank in more else x
        return Sum(tile, factor, more)

    def _product(self, lift: Lift) -> Any:
        if isinstance(self.factor, float) and self.factor == 1.0:
            return self.tile
        return _times(self.tile, self.factor, "tile", lift)

    def settled(self, lift: Lift, *, but: str | None = None) -> tuple[Any, Any]:
        """The tile with everything added, and what of rank ``but`` is left out (or None)."""
        more = {rank: x for rank, x in self.more.items() if rank != "scalar"}
        left = more.pop(but, None) if but is not None else None
        scalar = self.more.get("scalar")
        if scalar is not None:  # joins a vector, for nothing
            if more or but is None:
                rank = next(iter(more), "column")
                start = more.get(rank)
                wide = lift(_array(scalar), "scalar", rank)
                more[rank] = wide if start is None else start + wide
            else:
                wide = lift(_array(scalar), "scalar", but)
                left = wide if left is None else left + wide
        z = None if self.tile is None else self._product(lift)
        if z is None and not more:
            return lift(jnp.float32(0), "scalar", "tile"), left
        for rank, x in more.items():
            wide = lift(x, rank, "tile")
            z = wide if z is None else z + wide
        return z, left


def _array(number: Any) -> Any:
    return jnp.float32(number) if isinstance(number, float) else jnp.asarray(number)


def _times(x: Any, c: Any, rank: str, lift: Lift) -> Any:
    """``x`` of a rank times a number."""
    if rank == "scalar" or isinstance(c, int | float):
        return x * c
    return x * lift(jnp.asarray(c), "scalar", rank)


def evaluate(
    body: Body, score: Sum | None, values: dict[str, tuple[Any, str]],
    handed: list[tuple[Any, str]], near: dict[str, tuple[Any, str]], lift: Lift,
) -> Sum:
    """The value of ``body``.

    Args:
        score: the logits, None for a mask. values, handed, lift: see ``Body``. near: coordinates of
            ``body.floats`` as float32, counted from one place that is near the tile's queries.
    """
    known = body.given(values, handed)
    if score is not None:
        known[body.inputs["score"]] = score, "tile"

    def plain(x, entry):
        value, rank = entry
        if not isinstance(value, Sum):
            return entry
        whole = value.settled(lift)[0], rank
        if x in known and known[x][0] is value:  # settled once
            known[x] = whole
        return whole

    for step in body.steps:
        given = [operand(known, x) for x in step.operands]
        name = None if step.primitive is None else step.primitive.name
        if name is None and len(given) == 2 and all(x[6:] in near for x in step.operands):
            a, b = (near[x[6:]] for x in step.operands)
            found = _kept("sub", [a, b], lift) if a[1] != b[1] else None
        else:
            found = _kept(name, given, lift) if name in KEPT else None
            given = _compared(given, lift) if name in COMPARED else given
        if found is None:
            known[step.results[0]] = apply(step, list(map(plain, step.operands, given)), lift)
        else:
            known[step.results[0]] = found, "tile"
    value, rank = operand(known, body.result)
    return value if isinstance(value, Sum) else _as_sum(value, rank)


def _compared(given: list[tuple[Any, str]], lift: Lift) -> list[tuple[Any, str]]:
    """``row + column`` beside a number as ``row`` beside ``number - column``: a step less."""
    at = next((i for i, (x, _) in enumerate(given) if isinstance(x, Sum) and x.places), None)
    if at is None or given[1 - at][1] != "scalar":
        return given
    more = given[at][0].more
    rest = jnp.asarray(given[1 - at][0]) - more.get("scalar", 0)
    found = [(more["row"], "row"), (lift(rest, "scalar", "column") - more["column"], "column")]
    return found if at == 0 else found[::-1]


def _as_sum(value: Any, rank: str) -> Sum:
    if isinstance(value, Sum):
        return value
    value = float(value) if isinstance(value, np.floating) else value
    return Sum(value, 1.0, {}) if rank == "tile" else Sum(None, 1.0, {rank: value})


def _dtype(value: Any) -> Any:
    """Of a value; of a sum that of what it is made of."""
    if not isinstance(value, Sum):
        return value.dtype
    parts = [value.tile, *value.more.values()]
    return next((x.dtype for x in parts if hasattr(x, "dtype")), jnp.dtype("float32"))


def _kept(name: str, given: list[tuple[Any, str]], lift: Lift) -> Sum | None:
    """The result of a step as a sum, None where it is none or of a lower rank than a tile."""
    ranks = {rank for _, rank in given}
    if not ("tile" in ranks or {"row", "column"} <= ranks):
        return None
    if any(_dtype(value) != jnp.float32 for value, _ in given):
        places = all(_dtype(value) == jnp.int32 for value, _ in given)
        if not places or name != "sub" or ranks != {"row", "column"}:
            return None
    if name == "neg":
        return _as_sum(*given[0]).scaled(-1.0, lift)
    (a, rank_a), (b, rank_b) = given
    if name in ("add", "add_any", "sub"):
        other = _as_sum(b, rank_b)
        if name == "sub":
            other = other.scaled(-1 if _dtype(b) == jnp.int32 else -1.0, lift)
        return _as_sum(a, rank_a).plus(other, lift)
    if rank_b != "scalar" and (name == "div" or rank_a != "scalar"):
        return None
    if rank_b != "scalar":
        (a, rank_a), (b, rank_b) = given[::-1]
    number = float(b) if isinstance(b, np.floating) else b
    return _as_sum(a, rank_a).scaled(1 / number if name == "div" else number, lift)
