"""User functions of one (query, key) pair: traced once on scalars, evaluated on grids.

A ``score_mod(score, head, q_pos, k_pos)`` returns a new score, a ``mask_mod(head, q_pos, k_pos)``
whether the query sees the key. Both may also name any of the keywords ``batch, q_index, k_index,
q_segment, k_segment`` in their signature (``index`` is the place in the array, ``pos`` the position
in the document), and may close over arrays, to which gradients flow. They are traced on scalars, so
plain ``table[head, q_pos - k_pos]`` works; ``core.staging`` splits the result for fused kernels.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from attnlab.core.errors import ConfigError

PAIR = ("head", "q_pos", "k_pos")
EXTRA = ("batch", "q_index", "k_index", "q_segment", "k_segment")
COORDINATES = (*PAIR, *EXTRA)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function of scalars: its jaxpr, and what its arguments are.

    Compared by identity: a function traced anew is another program.

    Args:
        name: for messages. jaxpr: its constvars are the arrays captured. inputs: "score" and
            coordinate names, in order.
    """

    name: str
    jaxpr: Any
    inputs: tuple[str, ...]

    @property
    def used(self) -> frozenset[str]:
        """The inputs that the result depends on, as far as a look at the variables tells."""
        names = dict(zip(self.jaxpr.invars, self.inputs, strict=True))
        read = [v for eqn in self.jaxpr.eqns for v in eqn.invars] + list(self.jaxpr.outvars)
        return frozenset(names[v] for v in read if isinstance(v, jex.Var) and v in names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mod:
    """A traced function with the arrays it captures and the rows and heads it is asked for.

    Args:
        captured: arrays the function closes over, differentiable. batch, heads: int32 ``[B]`` and
            ``[N]``, the numbers of the rows and heads at hand (a shard holds some of them).
    """

    captured: tuple[jax.Array, ...]
    batch: jax.Array | None
    heads: jax.Array | None
    program: Program = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(function: Callable[..., Any], *, score_dtype: Any = None) -> Mod:
        """Trace ``function``: a score_mod where ``score_dtype`` is given, else a mask_mod."""
        kind = "mask_mod" if score_dtype is None else "score_mod"
        inputs = _inputs(function, kind)
        result = jnp.bool_ if score_dtype is None else jnp.dtype(score_dtype)
        leading = () if score_dtype is None else ("score",)

        def scalars(*values):
            named = dict(zip((*leading, *inputs), values, strict=True))
            given = [named.pop(name) for name in (*leading, *PAIR)]
            out = jnp.asarray(function(*given, **named))
            if out.shape != () or (out.dtype == jnp.bool_) != (result == jnp.bool_):
                raise ConfigError(
                    f"{kind} returns {out.dtype}{list(out.shape)}",
                    f"must return one {'truth value' if result == jnp.bool_ else 'number'} a pair",
                    "it is traced on scalars; index captured arrays down to one entry",
                )
            return out.astype(result)

        avals = [jax.ShapeDtypeStruct((), result) for _ in leading]
        avals += [jax.ShapeDtypeStruct((), jnp.int32) for _ in inputs]
        closed = jax.make_jaxpr(scalars)(*avals)
        name = getattr(function, "__name__", kind)
        captured = tuple(jnp.asarray(c) for c in closed.consts)
        return Mod(captured, None, None, Program(name, closed.jaxpr, (*leading, *inputs)))

    def bound(self, B: int, N: int) -> Mod:
        """For ``B`` rows and ``N`` heads, unless it is bound already."""
        if self.batch is not None:
            return self
        return dataclasses.replace(
            self, batch=jnp.arange(B, dtype=jnp.int32), heads=jnp.arange(N, dtype=jnp.int32)
        )

    def of_pair(self, *values: Any) -> Any:
        """The function of one pair: ``values`` as in ``program.inputs``."""
        return jax.core.eval_jaxpr(self.program.jaxpr, self.captured, *values)[0]

    def on_grid(self, q: Any, k: Any, score: jax.Array | None = None) -> jax.Array:
        """The function on all pairs of ``q`` and ``k`` (``mask.Coords``): ``[B, N, T, S]``.

        Axes that the function does not depend on have size 1. ``score``: ``[B, N, T, S]``.
        """
        sides: dict[str, tuple[Any, str]] = {
            "score": (score, "bnts"), "batch": (self.batch, "b"), "head": (self.heads, "n"),
            "q_pos": (q.positions, "bt"), "k_pos": (k.positions, "bs"),
            "q_index": (q.index, "t"), "k_index": (k.index, "s"),
            "q_segment": (q.segments, "bt"), "k_segment": (k.segments, "bs"),
        }
        used = [name for name in self.program.inputs if name in self.program.used]
        for name in used:
            if sides[name][0] is None:
                raise ConfigError(
                    f"{self.program.name} reads {name}", "the call has none",
                    "pass segments=, or do not name it in the signature",
                )
        axes = {name: sides[name][1] for name in used}

        def pair(*values):
            named = dict(zip(used, values, strict=True))
            arguments = [named.get(name, 0) for name in self.program.inputs]
            return self.of_pair(*arguments)

        present = [axis for axis in "bnts" if any(axis in a for a in axes.values())]
        function: Callable[..., Any] = pair
        for axis in reversed(present):
            here = [0 if axis in axes[name] else None for name in used]
            function = jax.vmap(function, in_axes=tuple(here))
        out = function(*(sides[name][0] for name in used)) if used else pair()
        return out.reshape([out.shape[present.index(a)] if a in present else 1 for a in "bnts"])

    def specs(self, P: Any, batch: tuple[str, ...], heads: tuple[str, ...]) -> Mod:
        """This with the partition of every array in its place; captured arrays are whole."""
        return dataclasses.replace(
            self, captured=tuple(P() for _ in self.captured), batch=P(batch), heads=P(heads)
        )


def _inputs(function: Callable[..., Any], kind: str) -> tuple[str, ...]:
    """The coordinates the function takes, by name: the three of every pair, then the extra ones."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return PAIR
    leading = 4 if kind == "score_mod" else 3
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in free]
    wanted = [p.name for p in named[leading:] if p.name in EXTRA or p.default is p.empty]
    unknown = [name for name in wanted if name not in EXTRA]
    positional = any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters)
    if unknown or (len(named) < leading and not positional):
        first = "score, " if kind == "score_mod" else ""
        raise ConfigError(
            f"{kind} takes ({', '.join(p.name for p in parameters)})",
            f"is called with ({first}head, q_pos, k_pos) and the keywords it names among "
            f"{', '.join(EXTRA)}",
            "give it these parameters; bind everything else by a closure",
        )
    return (*PAIR, *wanted)
