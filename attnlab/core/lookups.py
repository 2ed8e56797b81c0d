"""Lookups in captured arrays whose gradient is summed in one order, on every device.

The gradient of ``x[places]`` adds cotangents that share an entry. XLA's scatter does that on GPUs
with atomics, in any order. Here they are sorted by entry and summed by a segmented scan: a sum of
M of them is a tree of depth log2 M, ``O(M log M)`` work, nothing of size M x entries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core.axes import vary


def looked_up(x: jax.Array, found: jax.Array, places: jax.Array) -> jax.Array:
    """``found``, with the gradient that it has as ``x.reshape(-1)[places]``.

    Args:
        x: floating. found: what the lookup gave, of the shape of ``places``. places: int32, the
            flat index of each entry in ``x``; one that is out of range has no gradient.
    """
    return _looked_up(*vary((x, lax.stop_gradient(found), places)))


@jax.custom_vjp
def _looked_up(x, found, places):
    return found


def _forward(x, found, places):
    return found, (x, places)


def _backward(residuals, cotangent):
    x, places = residuals
    sums = ordered_sum(cotangent.reshape(-1), places.reshape(-1), x.size)
    return sums.reshape(x.shape).astype(x.dtype), jnp.zeros_like(cotangent), None


_looked_up.defvjp(_forward, _backward)


def ordered_sum(values: jax.Array, places: jax.Array, size: int) -> jax.Array:
    """``out[i] = sum of values[places == i]`` for ``0 <= i < size``, in an order that depends on
    ``places`` alone."""
    places, values = lax.sort((places, values), num_keys=1, is_stable=True)
    first = jnp.concatenate([jnp.ones_like(places[:1], bool), places[1:] != places[:-1]])

    def add(left, right):
        (left_first, left_sum), (right_first, right_sum) = left, right
        return left_first | right_first, jnp.where(right_first, right_sum, left_sum + right_sum)

    _, sums = lax.associative_scan(add, (first, values))
    entries = jnp.arange(size, dtype=places.dtype)
    last = jnp.searchsorted(places, entries, side="right") - 1
    there = (last >= 0) & (places[last] == entries)
    return jnp.where(there, sums[last], 0)
