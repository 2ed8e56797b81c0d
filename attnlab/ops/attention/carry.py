"""Attention over keys that come in parts: the state of a row of queries, carried from step to step.

A ring step sees some of the keys. Its state is (``core.softmax``)::

    m    a reference for the exponents of the keys seen, -inf where none was visible
    l = sum_s exp(z[s] - m)          o = sum_s exp(z[s] - m) v[s]

so that any split of the keys, in any order, parts without keys included, ends in the ``(o, lse)``
of one call over all of them::

    carry = None
    for k, v, k_positions in parts:
        carry = attention_step(carry, q, k, v, mask=mask, positions=(q_positions, k_positions))
    o, lse = finish(carry, sink_logits, dtype)

Sink logits join once, at the end. Everything is differentiable; each step saves its own part of the
output for the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnlab.core.errors import ConfigError, ShapeError
from attnlab.core.softmax import finish_state, merge_states
from attnlab.core.types import Layout
from attnlab.ops.attention import OP, _over_shards, arguments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """The state of ``T`` queries of ``N`` heads; float32 (or the softmax's dtype) throughout.

    Args:
        o: ``[B, T, N, V]``, the sum of weighted values, not yet divided.
        m, l: ``[B, T, N]``, reference and sum of the weights.
    """

    o: jax.Array
    m: jax.Array
    l: jax.Array

    @staticmethod
    def empty(B: int, T: int, N: int, V: int, dtype: Any = "float32") -> Carry:
        """The state of no keys."""
        zero = jnp.zeros((B, T, N), dtype)
        return Carry(jnp.zeros((B, T, N, V), dtype), zero - math.inf, zero)

    def check(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise ShapeError or ConfigError unless it is a state of ``shape = (B, T, N, V)``."""
        B, T, N, V = shape
        for name, wanted in (("o", (B, T, N, V)), ("m", (B, T, N)), ("l", (B, T, N))):
            x = getattr(self, name)
            if x.shape != wanted:
                raise ShapeError(
                    f"carry.{name} has shape {tuple(x.shape)}", f"must be {wanted}",
                    "go on with the queries and value width that it was made with",
                )
            if x.dtype != dtype:
                raise ConfigError(
                    f"carry.{name} has dtype {x.dtype}", f"softmax_dtype is {dtype}",
                    "keep the carry in the dtype of the softmax",
                )


def attention_step(
    carry: Carry | None,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    mask: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    positions: Any = None,
    segments: Any = None,
    layout: Layout = "any",
    sink_tokens: int = 0,
    logit_cap: float | None = None,
    softmax_dtype: str = "float32",
    impl: str | Sequence[str] | None = None,
) -> Carry:
    """The state of the keys in ``carry`` (None: none yet) and of these.

    Keywords are those of ``attention``; ``S`` may be 0. Implementations serve it that say so
    (``Implementation.step``). Inside ``shard_map`` a score_mod or mask_mod must be told the numbers
    of its heads and rows, see ``attention``; ``index`` counts within this step's keys.

    Raises:
        ShapeError, DtypeError, ConfigError: on bad arguments, the carry's included.
        ImplementationError: ``impl`` refuses the call or takes no carry.
    """
    call, given = arguments(
        q, k, v, mask=mask, score_mod=score_mod, scale=scale, positions=positions,
        segments=segments, layout=layout, sink_tokens=sink_tokens, sink_logits=None,
        logit_cap=logit_cap, return_lse=True, softmax_dtype=softmax_dtype,
    )
    shape = call.B, call.T, call.N, call.V
    if carry is not None:
        carry.check(shape, given["softmax_dtype"])
    if call.S == 0:
        return Carry.empty(*shape, given["softmax_dtype"]) if carry is None else carry
    chosen: Any = OP.choose(call, impl, step=True)

    def step(q, k, v, *before, **given):
        return chosen.step(before or None, q, k, v, **given)

    run = step if chosen.partitions else functools.partial(_over_shards, step)
    before = () if carry is None else (carry.o, carry.m, carry.l)
    return Carry(*run(q, k, v, *before, **given))


def merge(a: Carry, b: Carry) -> Carry:
    """The state of the keys of both; associative, and ``Carry.empty`` is neutral."""
    a.check(b.o.shape, b.o.dtype)
    m, l, o = merge_states(*((x.m[..., None], x.l[..., None], x.o) for x in (a, b)))
    return Carry(o, m[..., 0], l[..., 0])


def finish(
    carry: Carry, sink_logits: Float[Array, " N"] | None = None, dtype: Any = None
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """``(o, lse)`` of all keys seen, o in ``dtype`` (default: the carry's).

    Rows that saw no key and have no sink are zero with ``lse = -inf``.
    """
    if sink_logits is not None:
        N = carry.m.shape[-1]
        if sink_logits.shape != (N,):
            raise ShapeError(
                f"sink_logits has shape {tuple(sink_logits.shape)}", f"must be [N] = ({N},)",
                "one logit a query head",
            )
        sink_logits = sink_logits.astype(carry.m.dtype)[:, None]
    o, lse = finish_state((carry.m[..., None], carry.l[..., None], carry.o), sink_logits)
    return o.astype(carry.o.dtype if dtype is None else dtype), lse[..., 0]
