"""Modified scores on a tile with few operations: equal to the plain value, and really few."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.mask import Coords
from attnlab.core.mods import Mod
from attnlab.core.staging import split, values
from attnlab.ops.attention.affine import Sum, evaluate

T, S = 24, 40
SLOPE, BIAS, ROWS = 0.3, np.linspace(-1, 1, 64, dtype=np.float32), np.arange(9, 73.0, 1, "float32")


def lift(x, rank, to):
    shape = {"tile": (T, S), "row": (T, 1), "column": (1, S)}[to]
    return jnp.broadcast_to(x, shape)


def pieces(function, q0=0, k0=0):
    """``(body, values, handed, near)`` of a tile from query ``q0`` and key ``k0`` on."""
    mod = Mod.of(function, score_dtype="float32").bound(1, 1)
    body = split(mod.program, T, S)
    assert body.refusal is None
    sides = [np.arange(n, dtype=np.int32) + at for n, at in ((T, q0), (S, k0))]
    coords = [Coords(jnp.asarray(x)[None], None, jnp.arange(len(x))) for x in sides]
    shaped = [(jnp.asarray(sides[0])[:, None], "row"), (jnp.asarray(sides[1])[None], "column")]
    known = {
        f"{side}_{what}": x for side, x in zip("qk", shaped) for what in ("pos", "index")
    }
    near = {n: ((x - q0).astype(jnp.float32), r) for n, (x, r) in known.items()}
    known |= {f"float {n}": (x.astype(jnp.float32), r) for n, (x, r) in known.items()}
    ranks = {"heads": ("scalar", ()), "rows": ("row", (T, 1)), "columns": ("column", (1, S))}
    handed = [
        (x[0, 0].reshape(ranks[h.group][1]), ranks[h.group][0])
        for h, x in zip(body.handed, values(mod, body, *coords))
    ]
    return body, known, handed, near


def cap(s):
    return 30 * jnp.tanh(s / 30)


SLOPES, BIASES, ADDED = (jnp.asarray(x, jnp.float32) for x in ([SLOPE], BIAS, ROWS))
FUNCTIONS = {
    "same": lambda s, h, q, k: s,
    "cap and slope": lambda s, h, q, k: cap(s) + SLOPES[h] * (k - q),
    "slope first": lambda s, h, q, k: cap(s - SLOPES[h] * (q - k)),
    "numbers": lambda s, h, q, k: -(2 * s - 3) / 4 + 1,
    "rows and columns": lambda s, h, q, k: ADDED[q] + s * SLOPES[h] - BIASES[k] * 2,
    "a row's factor": lambda s, h, q, k: s * ADDED[q] + BIASES[k],
    "no score": lambda s, h, q, k: -SLOPES[h] * (q - k) + 2,
    "nothing at all": lambda s, h, q, k: 2.0,
    "two of the score": lambda s, h, q, k: 2 * s + cap(3 * s) - s * jnp.exp(s / 50),
    "distance twice": lambda s, h, q, k: jnp.where(q - k > 5, s, s * 0.5 - jnp.abs(q - k)),
    "number minus": lambda s, h, q, k: 1 - (k - q) * SLOPES[h] - s,
    "number over": lambda s, h, q, k: 7 / (2.5 + s * s) + q,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_plain_value(name):
    body, known, handed, near = pieces(FUNCTIONS[name], q0=7, k0=3)
    raw = jax.random.normal(jax.random.key(0), (T, S)) * 9
    plain = body(known | {"score": (raw * 0.25, "tile")}, handed, lift)
    found = evaluate(body, Sum(raw, 0.25, {}), known, handed, near, lift).scaled(1.5, lift)
    z, row = found.settled(lift, but="row")
    np.testing.assert_allclose(z + (0 if row is None else row), plain * 1.5, rtol=2e-5, atol=2e-4)
    whole, none = found.settled(lift)
    assert none is None
    np.testing.assert_allclose(whole, plain * 1.5, rtol=2e-5, atol=2e-4)


def operations(f, *arguments) -> list[str]:
    """The primitives that give a whole tile, copies aside."""
    jaxpr = jax.make_jaxpr(f)(*arguments).jaxpr
    found, stack = [], [jaxpr]
    while stack:
        for eqn in stack.pop().eqns:
            inner = [x.jaxpr for x in eqn.params.values() if hasattr(x, "jaxpr")]
            stack += inner
            whole = eqn.outvars[0].aval.shape == (T, S)
            if whole and not inner and eqn.primitive.name not in ("broadcast_in_dim", "copy"):
                found.append(eqn.primitive.name)
    return sorted(found)


@pytest.mark.parametrize("name, few", [
    ("same", ["mul"]),
    ("cap and slope", ["add", "mul", "mul", "tanh"]),
    ("numbers", ["mul"]),
    ("rows and columns", ["add", "mul"]),
])
def test_few_operations(name, few):
    body, known, handed, near = pieces(FUNCTIONS[name])

    def based(raw):
        z = evaluate(body, Sum(raw, 0.25, {}), known, handed, near, lift).scaled(1.5, lift)
        return z.settled(lift, but="row")[0]

    assert operations(based, jnp.ones((T, S))) == few


@pytest.mark.parametrize("distance", [0, 1000, 10**6])
def test_far_from_the_start(distance):
    """Places are counted from the queries: the slope rounds as distances do, not as places."""
    q0 = 10**6
    body, known, handed, near = pieces(FUNCTIONS["cap and slope"], q0, q0 - distance)
    z = evaluate(body, Sum(jnp.zeros((T, S)), 1.0, {}), known, handed, near, lift)
    q, k = np.arange(T)[:, None], np.arange(S) - distance
    exact = np.float64(np.float32(SLOPE)) * (k - q)
    error = np.abs(np.float64(z.settled(lift)[0]) - exact).max()
    assert error <= 2.0**-22 * SLOPE * (distance + S)


@pytest.mark.parametrize("function, alike", [
    (lambda h, q, k: q >= k, ["ge"]),
    (lambda h, q, k: q - k >= 0, ["ge"]),
    (lambda h, q, k: 3 > k - q, ["lt"]),
    (lambda h, q, k: (q - k >= 0) & (q - k < 9), ["and", "ge", "lt"]),
])
def test_masks_compare_places(function, alike):
    mod = Mod.of(function).bound(1, 1)
    body = split(mod.program, T, S)
    known = pieces(FUNCTIONS["same"], 5, 2)[1]

    def seen(_):
        return evaluate(body, None, known, [], {}, lift).settled(lift)[0]

    q, k = np.arange(T)[:, None] + 5, np.arange(S) + 2
    np.testing.assert_array_equal(seen(0), function(0, q, k))
    assert seen(0).dtype == bool
    assert operations(seen, jnp.zeros(())) == alike
