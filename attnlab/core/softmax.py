"""Softmax over keys in parts: the state ``(m, l, a)`` of some keys, and the state of two parts.

With any reference ``m`` (the largest logit keeps it in range), the keys of a part leave::

    l = sum_s exp(z[s] - m)        a = sum_s exp(z[s] - m) v[s]
    (m, l, a) + (m', l', a') = (M, l e + l' e', a e + a' e')    e = exp(m - M), e' = exp(m' - M)
    o = a / l                      lse = m + log l              M = max(m, m')

A part without visible key is ``(-inf, 0, 0)``, the neutral element; its gradients are zero. Shapes:
``m, l [..., 1]`` and ``a [..., V]``. All in float32 or float64.

Source: Milakov & Gimelshein 2018, arXiv 1805.02867.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

State = tuple  # (m, l, a)


def finite(x):
    """``x`` with 0 in place of what is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def merge_states(one: State, other: State) -> State:
    """The state of the keys of both.

    The result does not depend on which reference is taken, so ``M`` counts as constant.
    """
    top = lax.stop_gradient(jnp.maximum(one[0], other[0]))
    a, b = (jnp.exp(x[0] - finite(top)) for x in (one, other))
    return top, one[1] * a + other[1] * b, one[2] * a + other[2] * b


def finish_state(state: State, sink=None):
    """``(o, lse)`` of a state; a sink logit is one more key whose value is zero."""
    if sink is not None:
        one = jnp.ones((), state[1].dtype)
        state = merge_states(state, (sink, one, jnp.zeros((), state[2].dtype)))
    top, total, acc = state
    empty = total == 0
    total = jnp.where(empty, 1, total)
    return acc / total, jnp.where(empty, -jnp.inf, finite(top) + jnp.log(total))
