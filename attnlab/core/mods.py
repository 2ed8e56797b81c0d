"""User functions of one (query, key) pair: traced once on scalars, evaluated on grids.

A ``score_mod(score, head, q_pos, k_pos)`` returns a new score, a ``mask_mod(head, q_pos, k_pos)``
whether the query sees the key. Both may also name any of the keywords ``batch, q_index, k_index,
q_segment, k_segment`` in their signature (``index`` is the place in the array, ``pos`` the position
in the document), and may close over arrays, to which gradients flow. They are traced on scalars, so
plain ``table[head, q_pos - k_pos]`` works; ``core.staging`` splits the result for fused kernels.

They are also evaluated on pairs that the mask hides; the result is dropped there, but gradients of
captured arrays are sums over whole tiles, so the derivatives must be finite there too: write
``jnp.log1p(jnp.maximum(q_pos - k_pos, 0))``, not ``jnp.log1p(q_pos - k_pos)``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from attnlab.core.axes import vary, varying
from attnlab.core.errors import ConfigError, DtypeError, ShapeError

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
        """Trace ``function``: a score_mod where ``score_dtype`` is given, else a mask_mod.

        Raises ConfigError for a wrong signature, result or Python branch, DtypeError for captured
        arrays that are complex or, in a score_mod, floating but not of ``score_dtype``.
        """
        kind = "mask_mod" if score_dtype is None else "score_mod"
        inputs = _inputs(function, kind)
        result = jnp.bool_ if score_dtype is None else jnp.dtype(score_dtype)
        leading = () if score_dtype is None else ("score",)

        def scalars(*values):
            named = dict(zip((*leading, *inputs), values, strict=True))
            given = [named.pop(name) for name in (*leading, *PAIR)]
            out = function(*given, **named)
            if jax.tree.structure(out) != jax.tree.structure(0):
                raise ConfigError(
                    f"{kind} returns {type(out).__name__}", "must return one value a pair",
                    "return the score, or the truth value, and nothing else",
                )
            out = jnp.asarray(out)
            fits = (out.dtype == jnp.bool_) == (result == jnp.bool_)
            if out.shape != () or not fits or jnp.issubdtype(out.dtype, jnp.complexfloating):
                raise ConfigError(
                    f"{kind} returns {out.dtype}{list(out.shape)}",
                    f"must return one {'truth value' if result == jnp.bool_ else 'number'} a pair",
                    "it is traced on scalars; index captured arrays down to one entry",
                )
            return out.astype(result)

        avals = [jax.ShapeDtypeStruct((), result) for _ in leading]
        avals += [jax.ShapeDtypeStruct((), jnp.int32) for _ in inputs]
        name = getattr(function, "__name__", kind)
        try:
            closed = jax.make_jaxpr(scalars)(*avals)
        except jax.errors.ConcretizationTypeError as error:
            raise ConfigError(
                f"{kind} {name} branches in Python on a score or coordinate",
                "they are traced, so their values are not known yet",
                "use jnp.where, & and | in place of if, and, or",
            ) from error
        captured = tuple(jnp.asarray(c) for c in closed.consts)
        _check_captured(f"{kind} {name}", captured, None if score_dtype is None else result)
        return Mod(captured, None, None, Program(name, closed.jaxpr, (*leading, *inputs)))

    def bound(self, B: int, N: int) -> Mod:
        """For ``B`` rows and ``N`` heads: numbers them from 0 where they have no numbers yet."""
        for what, numbers, size in (("batch", self.batch, B), ("heads", self.heads, N)):
            if numbers is not None and numbers.shape != (size,):
                raise ShapeError(
                    f"{self.program.name} is bound to {what} of shape {tuple(numbers.shape)}",
                    f"the call has {size}", "number the rows and heads of this shard",
                )
        batch = jnp.arange(B, dtype=jnp.int32) if self.batch is None else self.batch
        heads = jnp.arange(N, dtype=jnp.int32) if self.heads is None else self.heads
        return dataclasses.replace(self, batch=batch, heads=heads)

    def at(self, *, batch: Any = None, heads: Any = None) -> Mod:
        """With the numbers of the rows ``[B]`` and heads ``[N]`` at hand; None: counted from 0.

        For calls inside ``shard_map``, where a shard holds some of the rows and heads.
        """
        batch, heads = (None if x is None else jnp.asarray(x, jnp.int32) for x in (batch, heads))
        return dataclasses.replace(self, batch=batch, heads=heads)

    @property
    def floats(self) -> tuple[jax.Array, ...]:
        """The captured arrays that have a gradient."""
        return tuple(x for x in self.captured if jnp.issubdtype(x.dtype, jnp.floating))

    def with_floats(self, floats: tuple[Any, ...]) -> Mod:
        """With others in their place (None where they travel apart)."""
        new = iter(floats)
        captured = tuple(
            next(new) if x is None or jnp.issubdtype(x.dtype, jnp.floating) else x
            for x in self.captured
        )
        return dataclasses.replace(self, captured=captured)

    def check_segments(self, given: bool) -> None:
        """Raise ConfigError where the function reads segments and the call has none."""
        reads = sorted(name for name in self.program.used if name.endswith("_segment"))
        if reads and not given:
            raise ConfigError(
                f"{self.program.name} reads {reads[0]}", "the call has none",
                "pass segments=, or do not name it in the signature",
            )

    def of_pair(self, *values: Any) -> Any:
        """The function of one pair: ``values`` as in ``program.inputs``."""
        every = vary((self.captured, values))
        axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(every)))
        if not axes:
            return jax.core.eval_jaxpr(self.program.jaxpr, self.captured, *values)[0]
        return _in_shard(self.program.jaxpr, every[0], every[1], axes)[0]

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
        self.check_segments(q.segments is not None and k.segments is not None)
        rows = {x.shape[0] for x, axes in (sides[name] for name in used) if axes[0] == "b"}
        for name in used:  # coordinates shared by all rows may come as [1, T]
            x, axes = sides[name]
            if axes[0] == "b" and x.shape[0] == 1 < max(rows):
                sides[name] = (x[0], axes[1:])
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
        out = jnp.asarray(function(*(sides[name][0] for name in used)) if used else pair())
        return out.reshape([out.shape[present.index(a)] if a in present else 1 for a in "bnts"])

    def specs(self, P: Any, batch: tuple[str, ...], heads: tuple[str, ...]) -> Mod:
        """This with the partition of every array in its place; captured arrays are whole."""
        return dataclasses.replace(
            self, captured=tuple(P() for _ in self.captured), batch=P(batch), heads=P(heads)
        )


# Calls that hold the program of a function; the name of the parameter that does.
CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
         "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr"}


def _in_shard(jaxpr: Any, consts: Any, values: Any, axes: frozenset) -> list[Any]:
    """``eval_jaxpr`` inside shard_map, which wants all operands of a step to vary alike."""

    def cast(x):
        missing = tuple(sorted(axes - varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), map(cast, (*consts, *values)), strict=True))

    def read(x: Any):
        aval: Any = x.aval
        return cast(jnp.asarray(x.val, aval.dtype)) if isinstance(x, jex.Literal) else env[x]

    for eqn in jaxpr.eqns:
        given = [read(x) for x in eqn.invars]
        inner = CALLS.get(eqn.primitive.name)
        if eqn.primitive.name == "pvary":  # from the trace; here every operand varies already
            outs = given
        elif inner is not None:
            closed = eqn.params[inner]
            opened, more = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
            outs = _in_shard(opened, more, given, axes)
        else:
            out = eqn.primitive.bind(*given, **eqn.params)
            outs = out if eqn.primitive.multiple_results else [out]
        env |= dict(zip(eqn.outvars, map(cast, outs), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _check_captured(what: str, captured: tuple[jax.Array, ...], score_dtype: Any) -> None:
    for x in captured:
        shape = f"{x.dtype}{list(x.shape)}"
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise DtypeError(
                f"{what} captures {shape}", "captured arrays are real",
                "capture the real and imaginary parts",
            )
        other = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != score_dtype
        if score_dtype is not None and other:
            raise DtypeError(
                f"{what} captures {shape}",
                f"floating arrays are captured in softmax_dtype = {score_dtype}, in which their "
                "gradients are summed",
                f"cast it outside the function: x.astype(jnp.{score_dtype})",
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
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    placed = [p.name for p in named[:leading] if p.kind in by_place]
    order = ("score", *PAIR) if kind == "score_mod" else PAIR
    swapped = any(a in ("score", *COORDINATES) and a != b for a, b in zip(placed, order))
    if unknown or swapped or (len(placed) < leading and not positional):
        first = "score, " if kind == "score_mod" else ""
        raise ConfigError(
            f"{kind} takes ({', '.join(p.name for p in parameters)})",
            f"is called with ({first}head, q_pos, k_pos) and the keywords it names among "
            f"{', '.join(EXTRA)}",
            "give it these parameters; bind everything else by a closure",
        )
    return (*PAIR, *wanted)
