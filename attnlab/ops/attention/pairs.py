"""The functions of one pair that fused kernels stage: the mask, and the score after its cap."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from attnlab.core.mask import Blocks, Causal, Coords, Full, Mask, Pair, Segments, Window, conjuncts
from attnlab.core.mods import CALLS, Mod


def pair_mod(mask: Mask, S: int | None) -> Mod:
    """The mask without its block lists as a function of a pair; ``S``: hide keys from there on."""
    rest = [part for part in conjuncts(mask) if not isinstance(part, Blocks)]

    def sees(head, q_pos, k_pos, *, batch, q_index, k_index, q_segment, k_segment):
        pair = Pair(batch, head, q_pos, k_pos, q_index, k_index, q_segment, k_segment)
        seen = None if S is None else k_index < S
        for part in rest:
            one = part.sees(pair)
            seen = one if seen is None else seen & one
        return jnp.ones((), bool) if seen is None else seen

    return Mod.of(sees)


def runs_mod(mask: Mask, q: Coords, layout: str) -> Mod | None:
    """The mask by two comparisons, where a query sees one run of keys that ends with its own.

    In packed rows that is any conjunction of Causal, Segments and Windows: a document fills the
    places ``[a, b)``, and its query at ``t`` sees ``s`` with
    ``t - min(t - a, window - 1) <= s <= t``. None for other masks.
    """
    rest = [part for part in conjuncts(mask) if not isinstance(part, Blocks | Full)]
    kinds = {type(part) for part in rest}
    if layout != "packed" or not {Causal, Segments} <= kinds <= {Causal, Segments, Window}:
        return None
    windows = [part for part in rest if isinstance(part, Window)]
    if any(part.ahead is not None for part in windows):
        return None
    back = q.positions
    for part in windows:
        back = jnp.minimum(back, part.size - 1)
    after = jnp.iinfo(jnp.int32).max
    first = jnp.where(jnp.asarray(q.segments) > 0, jnp.asarray(q.index) - back, after)

    def sees(head, q_pos, k_pos, *, batch, q_index, k_index):
        return (k_index <= q_index) & (first[batch, q_index] <= k_index)

    return Mod.of(sees)


def capped(score: Mod | None, cap: float | None) -> Mod | None:
    """The logit cap ``c tanh(z / c)``, then ``score``, as one function."""
    if cap is None:
        return score

    def bounded(s):
        return cap * jnp.tanh(s * (1.0 / cap))

    if score is None:
        return Mod.of(lambda s, head, q_pos, k_pos: bounded(s), score_dtype="float32")

    def both(s, head, q_pos, k_pos, *, batch, q_index, k_index, q_segment, k_segment):
        known = dict(
            score=bounded(s), head=head, q_pos=q_pos, k_pos=k_pos, batch=batch, q_index=q_index,
            k_index=k_index, q_segment=q_segment, k_segment=k_segment,
        )
        return score.of_pair(*(known[name] for name in score.program.inputs))

    out = Mod.of(both, score_dtype="float32")
    return dataclasses.replace(out, batch=score.batch, heads=score.heads)


def with_plain_sums(function, *args):
    """``function(*args)`` where the sums of cotangents that jax makes of a value used twice are
    additions: Mosaic GPU has no lowering for its ``add_any``."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)

    def run(jaxpr: Any, consts, values):
        names = (*jaxpr.constvars, *jaxpr.invars)
        env: dict[Any, Any] = dict(zip(names, (*consts, *values), strict=True))

        def read(x):
            return x.val if isinstance(x, jex.Literal) else env[x]

        for eqn in jaxpr.eqns:
            given, inner = [read(x) for x in eqn.invars], CALLS.get(eqn.primitive.name)
            if inner is not None:
                called = eqn.params[inner]
                out = run(getattr(called, "jaxpr", called), getattr(called, "consts", ()), given)
            elif eqn.primitive.name == "add_any":
                out = [given[0] + given[1]]
            else:
                out = eqn.primitive.bind(*given, **eqn.params)
                out = out if eqn.primitive.multiple_results else [out]
            env |= dict(zip(eqn.outvars, out, strict=True))
        return [read(x) for x in jaxpr.outvars]

    out = run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)
