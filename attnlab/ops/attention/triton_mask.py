"""The structured mask as the Triton kernels read it: alternatives, each an interval of positions.

Every structured mask but ``Segments`` lets a query see the keys whose position lies in an interval
that depends on the query alone::

    Causal          k <= q                      Prefix(L)        k <= L - 1
    Window(w, a)    q - w + 1 <= k (<= q + a)   SinkTokens(c)    k <= min(c - 1, q)

A mask composed with ``&`` and ``|`` is one of several alternatives (its disjunctive form), each a
conjunction: one interval, and whether the segments must agree. The bounds are two vectors a query,
computed outside; the kernel compares key positions with them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.errors import UnsupportedError
from attnlab.core.mask import (
    And,
    Causal,
    Coords,
    Full,
    Mask,
    Or,
    Prefix,
    Segments,
    SinkTokens,
    Window,
    Wrapped,
)

LOW, HIGH, SEGMENT = 1, 2, 4  # what a clause checks; the bits of ``Clauses.flags``
LEAST, MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def count(mask: Mask) -> int:
    """How many alternatives ``mask`` has; cheap where there are too many to write down."""
    if isinstance(mask, Wrapped):
        return count(mask.inner)
    if isinstance(mask, Or):
        return count(mask.left) + count(mask.right)
    return count(mask.left) * count(mask.right) if isinstance(mask, And) else 1


def alternatives(mask: Mask) -> list[list[Mask]]:
    """The disjunctive form: ``mask`` holds where all masks of one of the lists do."""
    if isinstance(mask, Wrapped):
        return alternatives(mask.inner)
    if isinstance(mask, Or):
        return alternatives(mask.left) + alternatives(mask.right)
    if isinstance(mask, And):
        return [a + b for a in alternatives(mask.left) for b in alternatives(mask.right)]
    return [[mask]]


@dataclasses.dataclass(frozen=True)
class Clauses:
    """A mask in intervals.

    Args:
        low, high: int32 ``[B, C, T]``, inclusive bounds of the key positions of each of C clauses.
        flags: which of LOW, HIGH and SEGMENT a clause checks, three bits each, the first lowest.
    """

    low: Any
    high: Any
    flags: int

    @property
    def number(self) -> int:
        return self.low.shape[1]


def clauses(mask: Mask, q: Coords) -> Clauses:
    """``mask`` for queries at ``q``. Raises UnsupportedError on a mask that is no interval."""
    flags, lows, highs = 0, [], []
    for i, clause in enumerate(alternatives(mask)):
        found = [bounds(part, q.positions) for part in clause]
        least = [low for low, _ in found if low is not None]
        most = [high for _, high in found if high is not None]
        lows.append(functools.reduce(jnp.maximum, least, jnp.full_like(q.positions, LEAST)))
        highs.append(functools.reduce(jnp.minimum, most, jnp.full_like(q.positions, MOST)))
        one = (LOW if least else 0) | (HIGH if most else 0)
        one |= SEGMENT if any(isinstance(part, Segments) for part in clause) else 0
        flags |= one << 3 * i
    return Clauses(jnp.stack(lows, 1), jnp.stack(highs, 1), flags)


def bounds(mask: Mask, q: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
    """``(low, high)`` of the key positions that queries at positions ``q[B, T]`` see, None for no
    bound. Sums saturate: a window may be longer than any row."""
    if isinstance(mask, Full | Segments):
        return None, None
    if isinstance(mask, Causal):
        return None, q
    if isinstance(mask, Window):
        back = min(mask.size - 1, MOST)
        low = jnp.maximum(q, LEAST + back) - back
        if mask.ahead is None:
            return low, None
        ahead = min(mask.ahead, MOST)
        return low, jnp.minimum(q, MOST - ahead) + ahead
    if isinstance(mask, Prefix):
        length = jnp.asarray(mask.length, jnp.int32).reshape(-1, 1)
        return None, jnp.broadcast_to(length - 1, q.shape)
    if isinstance(mask, SinkTokens):
        return None, jnp.minimum(q, mask.count - 1)
    raise UnsupportedError(
        f"the mask {type(mask).__name__}", "is no interval of key positions",
        "use impl='gpu' or impl='xla'",
    )
