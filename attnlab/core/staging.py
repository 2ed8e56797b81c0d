"""Split a traced function of one pair into what a fused kernel computes and what it is handed.

A fused kernel cannot index captured arrays. But in ``score + slope[head] * (k_pos - q_pos)`` the
lookup depends on the head alone, so it can be done once, outside. ``split`` sorts every value of
the program by the coordinates it depends on and hoists what is needed:

==========  =====================  =================================  ==========================
group       depends on             shape outside the kernel           in the kernel
==========  =====================  =================================  ==========================
heads       row and head           ``[B or 1, N or 1]``               a scalar
rows        and on the query       ``[B or 1, N or 1, T]``            a vector beside the queries
columns     and on the key         ``[B or 1, N or 1, S]``            a vector beside the keys
distances   and on q - k only      ``[B or 1, N or 1, S - 1 + T]``    a Toeplitz tile
dense       on query and key       ``[B or 1, N or 1, T, S]``         a tile
==========  =====================  =================================  ==========================

What remains (``Body``) is elementwise. The hoisted values are plain JAX, so gradients of captured
arrays follow from the gradients of these few operands, whatever the function does with the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from attnlab.core.lookups import looked_up
from attnlab.core.mods import CALLS, Mod, Program

GROUPS = ("heads", "rows", "columns", "distances", "dense")
_ELEMENTWISE = frozenset(
    "add add_any sub mul div rem max min neg sign abs exp exp2 log log1p expm1 tanh sin cos tan "
    "sqrt rsqrt cbrt pow integer_pow square logistic erf erf_inv erfc floor ceil round atan2 and "
    "or xor not shift_left shift_right_logical shift_right_arithmetic eq ne lt le gt ge select_n "
    "clamp convert_element_type is_finite copy copy_p stop_gradient".split()
)
_SHAPES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "expand_dims"))
_PLACES = ("_pos", "_index")
_ATOMS = {"score": "s", "batch": "b", "head": "n", "q_pos": "q", "q_index": "q", "q_segment": "q",
          "k_pos": "k", "k_index": "k", "k_segment": "k"}


@dataclasses.dataclass(frozen=True)
class _Step:
    """One primitive of the flattened program; operands are variable numbers or constants."""

    primitive: Any  # None: the float32 value of one coordinate, or the difference of two
    params: dict[str, Any]
    operands: tuple[Any, ...]  # int: variable; _Constant: literal; str: a float coordinate
    results: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Constant:
    value: Any


@dataclasses.dataclass(frozen=True)
class Handed:
    """A value handed to the kernel: its group, variable and dtype ("bool" travels as int32)."""

    group: str
    variable: int
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """The elementwise rest of a program.

    Args:
        handed: the hoisted values in order. coordinates: coordinates it still reads. primitives:
            names of the primitives it needs. refusal: why a kernel cannot compute it, or None.
        floats: coordinates it reads as float32; differences of two of them are taken after the
            conversion, which is exact below 2**24 and spares a conversion a pair.
    """

    program: Program
    steps: tuple[_Step, ...]
    inputs: dict[str, int]
    result: Any
    handed: tuple[Handed, ...]
    coordinates: frozenset[str]
    primitives: frozenset[str]
    refusal: str | None
    floats: frozenset[str] = frozenset()

    def __call__(
        self, values: dict[str, tuple[Any, str]], handed: list[tuple[Any, str]],
        lift: Callable[[Any, str, str], Any],
    ) -> Any:
        """The result on a tile.

        Args:
            values: coordinate (and "score", and coordinates of ``floats`` as "float q_pos") to its
                value and rank; ranks are "scalar", "row" (a vector beside the queries), "column",
                "tile".
            handed: value and rank of each entry of ``handed``.
            lift: ``lift(value, rank, to)``, the value broadcast to a higher rank.
        """
        known = self.given(values, handed)
        for step in self.steps:
            known[step.results[0]] = apply(step, [operand(known, x) for x in step.operands], lift)
        value, rank = operand(known, self.result)
        return value if rank == "tile" else lift(_as_array(value), rank, "tile")

    def given(self, values: dict[str, tuple[Any, str]], handed: list[tuple[Any, str]]) -> dict:
        """Variables whose value and rank is known at the start; arguments as of a call."""
        known: dict[Any, tuple[Any, str]] = {
            self.inputs.get(name, name): value for name, value in values.items()
        }
        for entry, (value, rank) in zip(self.handed, handed, strict=True):
            known[entry.variable] = (value != 0 if entry.dtype == "bool" else value, rank)
        return known


def operand(known: dict, x: Any) -> tuple[Any, str]:
    """Value and rank of an operand of a step."""
    return (x.value, "scalar") if isinstance(x, _Constant) else known[x]


def apply(step: _Step, given: list[tuple[Any, str]], lift: Callable[[Any, str, str], Any]):
    """Value and rank of the result of one step of a body."""
    rank = functools.reduce(_join, (r for _, r in given), "scalar")
    if step.primitive is not None and step.primitive.name in _SHAPES:
        return given[0]
    arguments = [_as_array(v) if r == rank else lift(_as_array(v), r, rank) for v, r in given]
    params = {k: v for k, v in step.params.items() if k != "sharding"}
    if step.primitive is None:
        out = arguments[0] - arguments[1] if len(arguments) > 1 else arguments[0]
    elif step.primitive.name == "convert_element_type":
        out = lax.convert_element_type(arguments[0], params["new_dtype"])
    elif step.primitive.name == "div" and given[1][1] == "scalar" != rank and _real(given):
        out = arguments[0] * lift(1 / _as_array(given[1][0]), "scalar", rank)
    elif step.primitive.name == "select_n":
        out = jnp.where(arguments[0], arguments[2], arguments[1])
    else:
        out = step.primitive.bind(*arguments, **params)
    return out, rank


def _real(given) -> bool:
    return all(jnp.issubdtype(_as_array(v).dtype, jnp.floating) for v, _ in given)


def _as_array(value):
    return jnp.asarray(value) if not hasattr(value, "dtype") else value


def _join(a: str, b: str) -> str:
    if a == "scalar" or a == b:
        return b
    return a if b == "scalar" else "tile"


@functools.lru_cache(maxsize=256)
def split(program: Program, T: int, S: int) -> Body:
    """``program`` for ``T`` queries and ``S`` keys, split; ``Body.refusal`` says what cannot be."""
    steps, variables, result, sizes = _flatten(program)
    captured = dict(enumerate(program.jaxpr.constvars))
    inputs = {name: len(captured) + i for i, name in enumerate(program.inputs)}
    depends: dict[int, frozenset[str]] = {i: frozenset() for i in captured}
    depends |= {v: frozenset(_ATOMS[name]) for name, v in inputs.items()}
    looks_up: dict[int, int] = {i: max(v.aval.size, 2) for i, v in captured.items()}
    source: dict[int, _Step] = {}
    sides = [(inputs.get("q_" + x), inputs.get("k_" + x)) for x in ("pos", "index")]
    for step in steps:
        read = [x for x in step.operands if not isinstance(x, _Constant)]
        atoms = frozenset().union(*(depends[x] for x in read))
        if step.primitive.name == "sub" and any(set(read) == set(pair) for pair in sides):
            atoms = frozenset("d")
        for r in step.results:
            depends[r], source[r] = atoms, step
            most = max((looks_up.get(x, 0) for x in read), default=0)
            # What a head's number settles is handed over as a scalar: no lookup is left after it.
            looks_up[r] = most if not atoms or _group(atoms, True) != "heads" else 0

    handed: dict[int, Handed] = {}
    kept: dict[int, _Step] = {}
    refusal: list[str] = []
    coordinates: set[str] = set()
    floats: set[str] = set()
    names = {v: name for name, v in inputs.items()}

    def as_floats(v) -> tuple[str, ...] | None:
        """The coordinates whose float32 values (or their difference) ``v`` is."""
        step = source.get(v)
        if step is None or step.primitive.name != "convert_element_type":
            return None
        if step.params["new_dtype"] != jnp.float32 or isinstance(step.operands[0], _Constant):
            return None
        read = (step.operands[0],)
        if read[0] in source and source[read[0]].primitive.name == "sub":
            read = source[read[0]].operands
        if all(not isinstance(x, _Constant) and names.get(x, "head")[1:] in _PLACES for x in read):
            return tuple(names[x] for x in read)
        return None

    def need(v) -> None:
        if isinstance(v, _Constant) or v in handed or v in kept:
            return
        if v in names and names[v] not in ("head", "batch"):
            coordinates.add(names[v])
            return
        if isinstance(floated := as_floats(v), tuple):
            floats.update(floated)
            kept[v] = _Step(None, {}, tuple(f"float {name}" for name in floated), (v,))
            return
        group = _group(depends[v], bool(looks_up.get(v)))
        if not depends[v] and not looks_up.get(v) and v in source:
            group = None  # a constant of the program
        step = source.get(v)
        tile = group in (None, "dense")
        plain = step is not None and (
            step.primitive.name in _ELEMENTWISE
            or (step.primitive.name in _SHAPES and sizes[v] == () == sizes[step.operands[0]])
        )
        if (group is not None and not tile) or (group == "dense" and not plain):
            if sizes[v] != ():
                refusal.append("it uses a vector where a number a pair is needed")
            if group == "dense" and looks_up[v] < T * S:
                refusal.append(
                    "it looks up a captured array by query and key together, which is not their "
                    "difference: T x S values would be stored"
                )
            handed[v] = Handed(str(group), v, str(variables[v]))
            return
        if not plain:
            what = "an input" if step is None else step.primitive.name
            refusal.append(f"{what} cannot be computed inside a tile")
            return
        kept[v] = step  # type: ignore[assignment]
        for x in step.operands:  # type: ignore[union-attr]
            need(x)

    need(result)
    order = [kept[s.results[0]] for s in steps if s.results[0] in kept]
    return Body(
        program, tuple(order), inputs, result, tuple(handed.values()), frozenset(coordinates),
        frozenset(s.primitive.name for s in order if s.primitive is not None),
        refusal[0] if refusal else None, frozenset(floats),
    )


def _group(atoms: frozenset[str], looks_up: bool) -> str | None:
    """Where a value with these dependences is best computed; None: in the kernel."""
    if "s" in atoms:
        return None
    if atoms <= {"b", "n"}:
        return "heads"
    if not looks_up:
        return None  # coordinates are at hand in the kernel
    for group, side in (("rows", "q"), ("columns", "k"), ("distances", "d")):
        if atoms <= {"b", "n", side}:
            return group
    return "dense"


def values(
    mod: Mod, body: Body, q: Any, k: Any, distances: np.ndarray | None = None
) -> list[jax.Array]:
    """The hoisted values of ``body`` for coordinates ``q`` and ``k`` (``mask.Coords``).

    Shapes as in the table above; float32 (differentiable in ``mod.captured``), or int32.
    ``distances``: the distances to take values at, in place of all of them.
    """
    T, S = q.index.shape[0], k.index.shape[0]
    steps, _, _, _ = _flatten(mod.program)
    span = np.arange(-(S - 1), T) if distances is None else distances
    span = jnp.asarray(span, jnp.int32)
    zero = jnp.zeros((), jnp.int32)
    both = {"batch": (mod.batch, "b"), "head": (mod.heads, "n")}
    rows = {"q_pos": (q.positions, "bt"), "q_index": (q.index, "t"),
            "q_segment": (q.segments, "bt")}
    columns = {"k_pos": (k.positions, "bs"), "k_index": (k.index, "s"),
               "k_segment": (k.segments, "bs")}
    distance = {"q_pos": (span, "d"), "q_index": (span, "d"), "k_pos": (zero, ""),
                "k_index": (zero, "")}
    sources = {"heads": both, "rows": both | rows, "columns": both | columns,
               "distances": both | distance, "dense": both | rows | columns}
    return [
        _hoist(mod, steps, body, entry, sources[entry.group]) for entry in body.handed
    ]


def index_runs(body: Body, T: int, S: int) -> np.ndarray:
    """Distances that look up the same entries have the same number: int ``[S - 1 + T]``, ascending.

    The first is the distance ``-(S - 1)``. Where a value handed by distance depends on the distance
    not only through the indices of its lookups, or where the indices depend on more than the
    distance, every distance has its own number.
    """
    own = np.arange(S - 1 + T)
    steps, _, _, _ = _flatten(body.program)
    by_result = {r: s for s in steps for r in s.results}
    inputs = {v: name for name, v in body.inputs.items()}
    captured = set(range(len(body.program.jaxpr.constvars)))

    def free_of(v, kinds) -> bool:  # no input for which kinds(name) holds is read on the way to v
        if isinstance(v, _Constant) or v in captured:
            return True
        if v in inputs:
            return not kinds(inputs[v])
        return all(free_of(x, kinds) for x in by_result[v].operands)

    indices: list[Any] = []

    def collect(v) -> bool:  # the distance reaches v through lookups only
        if isinstance(v, _Constant) or free_of(v, lambda name: name[0] in "qk"):
            return True
        step = by_result.get(v)
        if step is None:
            return False
        if step.primitive.name in ("dynamic_slice", "gather"):
            indices.extend(step.operands[1:])
            return collect(step.operands[0])
        return all(collect(x) for x in step.operands)

    entries = [h.variable for h in body.handed if h.group == "distances"]
    if not all(collect(v) for v in entries):
        return own
    indices = [v for v in dict.fromkeys(indices) if not isinstance(v, _Constant)]
    indices = [v for v in indices if not free_of(v, lambda name: name[0] in "qk")]

    def clean(v) -> bool:  # computed from the distance alone
        if isinstance(v, _Constant):
            return True
        if v in captured or inputs.get(v, "q") in ("head", "batch", "score"):
            return False
        return v in inputs or all(clean(x) for x in by_result[v].operands)

    if not all(clean(v) for v in indices):
        return own
    with jax.ensure_compile_time_eval():
        span = jnp.arange(-(S - 1), T, dtype=jnp.int32)
        env: dict[int, Any] = {}
        for name, v in body.inputs.items():
            env[v] = span if name in ("q_pos", "q_index") else jnp.zeros_like(span)

        def value(v):
            if isinstance(v, _Constant):
                return jnp.asarray(v.value)
            if v not in env:
                step = by_result[v]
                given = [value(x) for x in step.operands]
                lanes = [jnp.broadcast_to(x, span.shape) for x in given]
                one = functools.partial(step.primitive.bind, **step.params)
                env[v] = jax.vmap(one)(*lanes)
            return env[v]

        table = np.stack([np.asarray(value(v)) for v in indices]) if indices else np.zeros((1, 1))
    table = np.broadcast_to(table, (table.shape[0], own.shape[0]))
    return np.cumsum(np.concatenate([[0], (table[:, 1:] != table[:, :-1]).any(0)]))


_TAIL = {"heads": "", "rows": "t", "columns": "s", "distances": "d", "dense": "ts"}


def _hoist(mod: Mod, steps, body: Body, entry: Handed, given: dict) -> jax.Array:
    wanted: set[int] = set()
    stack = [entry.variable]
    by_result = {r: s for s in steps for r in s.results}
    while stack:
        v = stack.pop()
        if v in wanted:
            continue
        wanted.add(v)
        if v in by_result:
            stack += [x for x in by_result[v].operands if not isinstance(x, _Constant)]
    used = [name for name, v in body.inputs.items() if v in wanted and name in given]
    all_axes = "bn" + _TAIL[entry.group]
    env: dict[int, tuple[Any, str]] = {i: (x, "") for i, x in enumerate(mod.captured)}
    env |= {body.inputs[name]: given[name] for name in used}
    for step in steps:
        if step.results[0] in wanted:
            read = [(x.value, "") if isinstance(x, _Constant) else env[x] for x in step.operands]
            outs = _over_axes(step, read, all_axes, ordered=entry.group != "dense")
            env |= dict(zip(step.results, outs, strict=True))
    out, present = env[entry.variable]
    out = jnp.asarray(out)
    if out.dtype == jnp.bool_ or jnp.issubdtype(out.dtype, jnp.integer):
        out = out.astype(jnp.int32)
    out = out.reshape([out.shape[present.index(a)] if a in present else 1 for a in all_axes])
    full = {"t": given.get("q_index", (None,))[0], "s": given.get("k_index", (None,))[0]}
    tail = [full[a].shape[0] if a in "ts" else out.shape[2 + i]
            for i, a in enumerate(_TAIL[entry.group])]
    return jnp.broadcast_to(out, (*out.shape[:2], *tail))


def _over_axes(step: _Step, read: list[tuple[Any, str]], order: str, ordered: bool):
    """``(value, axes)`` of each result of a step on operands that have ``axes`` in front.

    ordered: gradients of what is looked up are sums in one order, see ``core.lookups``. Not with
    values by query and key: there are T x S of them, nearly always of different entries.
    """
    present = "".join(a for a in order if any(a in axes for _, axes in read))

    def mapped(*operands, **changed):
        one: Callable[..., Any] = functools.partial(step.primitive.bind, **(step.params | changed))
        for axis in reversed(present):
            one = jax.vmap(one, in_axes=tuple(0 if axis in axes else None for _, axes in read))
        return one(*operands)

    values = [x for x, _ in read]
    out = mapped(*values)
    if step.primitive.name in ("gather", "dynamic_slice") and ordered and present:
        x = jnp.asarray(values[0])
        if jnp.issubdtype(x.dtype, jnp.floating):
            places = jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape)
            nowhere = {"fill_value": -1} if "fill_value" in step.params else {}
            out = looked_up(x, out, mapped(places, *values[1:], **nowhere))
    return [(x, present) for x in (out if step.primitive.multiple_results else [out])]


def _key(eqn: Any, given: list[Any]) -> Any:
    """Equal for steps that compute the same; None where that cannot be told."""
    if len(eqn.outvars) != 1:
        return None
    read = tuple(
        (x.value.dtype.name, repr(x.value.item())) if isinstance(x, _Constant) and x.value.ndim == 0
        else x for x in given
    )
    try:
        key = (eqn.primitive, tuple(sorted(eqn.params.items())), read)
        hash(key)
    except TypeError:
        return None
    return key


@functools.lru_cache(maxsize=256)
def _flatten(program: Program):
    """The program with all calls inlined: ``(steps, dtypes, result, shapes)``.

    What is written twice (``slope[head]``, say) is computed, and handed to the kernel, once.
    """
    steps: list[_Step] = []
    known: dict[Any, int] = {}
    variables: dict[int, Any] = {}
    shapes: dict[int, tuple[int, ...]] = {}

    def fresh(aval: Any) -> int:
        variables[len(variables)] = aval.dtype
        shapes[len(shapes)] = aval.shape
        return len(variables) - 1

    def walk(jaxpr: Any, env):
        def read(x):
            if isinstance(x, jex.Literal):
                aval: Any = x.aval
                return _Constant(x.val if aval.shape else aval.dtype.type(x.val))
            return env[x]

        for eqn in jaxpr.eqns:
            given = [read(x) for x in eqn.invars]
            inner = CALLS.get(eqn.primitive.name)
            if inner is not None:
                closed = eqn.params[inner]
                opened, consts = (
                    (closed.jaxpr, closed.consts) if hasattr(closed, "consts") else (closed, ())
                )
                scope = dict(zip(opened.constvars, map(_Constant, consts), strict=True))
                scope |= dict(zip(opened.invars, given, strict=True))
                results = walk(opened, scope)
                env |= dict(zip(eqn.outvars, results, strict=True))
                continue
            key = _key(eqn, given)
            if key is not None and key in known:
                env[eqn.outvars[0]] = known[key]
                continue
            results = tuple(fresh(v.aval) for v in eqn.outvars)
            if key is not None:
                known[key] = results[0]
            env |= dict(zip(eqn.outvars, results, strict=True))
            steps.append(_Step(eqn.primitive, eqn.params, tuple(given), results))
        return [read(v) for v in jaxpr.outvars]

    env = {v: fresh(v.aval) for v in (*program.jaxpr.constvars, *program.jaxpr.invars)}
    result = walk(program.jaxpr, env)[0]
    return tuple(steps), variables, result, shapes
