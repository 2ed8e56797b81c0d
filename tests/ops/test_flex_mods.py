"""Functions of a pair: tracing, their split for kernels, and what is refused with what words."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import MODS, Shape, bucket

from attnlab.core.dispatch import Device
from attnlab.core.errors import ConfigError, DtypeError, ImplementationError, ShapeError
from attnlab.core.mask import Blocks, Causal, Coords, MaskMod, Window
from attnlab.core.mods import Mod
from attnlab.core.staging import Body, split, values
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import OP, Call, attention
from attnlab.testing.budget import close

SLOPE, TABLE, KEYS = jnp.arange(4.0), jnp.ones((4, 32)), jnp.ones((2, 4, 16))
LONG, SQUARE = jnp.ones((4, 31)), jnp.ones((4, 16, 16))
T = 16


@pytest.mark.parametrize("function, groups, coordinates", [
    (lambda s, h, q, k: s, [], {"score"}),
    (lambda s, h, q, k: s * SLOPE[0], ["heads"], {"score"}),
    (lambda s, h, q, k: s + SLOPE[h] * (k - q), ["heads"], {"score"}),
    (lambda s, h, q, k: SLOPE[h] * jnp.tanh(s / SLOPE[h]), ["heads"], {"score"}),
    (lambda s, h, q, k: jnp.where(q > k, s, SLOPE[h]), ["heads"], {"score", "q_pos", "k_pos"}),
    (lambda s, h, q, k, *, batch, k_index: s + KEYS[batch, h, k_index], ["columns"], {"score"}),
    (
        lambda s, h, q, k, *, batch, q_index, k_index: (
            s + KEYS[batch, h, q_index] - KEYS[batch, h, k_index]
        ), ["rows", "columns"], {"score"},
    ),
    (lambda s, h, q, k: s + TABLE[h, bucket(q - k)], ["distances"], {"score"}),
    (lambda s, h, q, k: s + TABLE[h, jnp.clip(k - q + 3, 0, 31)], ["distances"], {"score"}),
    (lambda s, h, q, k, *, q_index, k_index: s * LONG[h, q_index - k_index + 15], ["distances"],
     {"score"}),
    (lambda s, h, q, k, *, q_index, k_index: s + SQUARE[h, q_index, k_index], ["dense"], {"score"}),
    (lambda s, h, q, k, *, q_segment: s * (q_segment == 1), [], {"score", "q_segment"}),
])
def test_groups(function, groups, coordinates):
    body = split(Mod.of(function, score_dtype="float32").program, T, T)
    assert body.refusal is None
    assert [entry.group for entry in body.handed] == groups
    assert body.coordinates == coordinates


@pytest.mark.parametrize("function, reason", [
    (lambda s, h, q, k: s + TABLE[q % 4, k % 32], "looks up a captured array by query and key tog"),
    (lambda s, h, q, k: jax.lax.fori_loop(0, 3, lambda i, x: x * s, s), "cannot be computed i"),
    (lambda s, h, q, k: TABLE[0, s.astype(jnp.int32)], "cannot be computed inside a tile"),
    (lambda s, h, q, k: s + (TABLE[h] * s).sum(), "reduce_sum cannot be computed inside a tile"),
    (lambda s, h, q, k: s + jnp.arange(8)[q - k], "cannot be computed inside a tile"),
])
def test_refusals_have_reasons(function, reason):
    body = split(Mod.of(function, score_dtype="float32").program, 64, 64)
    assert body.refusal is not None
    assert reason in body.refusal


def on_tiles(body: Body, handed, q: Coords, k: Coords, score):
    """``body`` on one tile of every row and head, with ranks as a kernel has them."""
    B, N, T, S = score.shape

    def lift(x, rank, to):
        if rank == to:
            return x
        if rank == "scalar":
            shape = {"row": (T,), "column": (S,), "tile": (T, S)}[to]
            return jnp.broadcast_to(x, shape)
        return jnp.broadcast_to(x[:, None] if rank == "row" else x[None], (T, S))

    sides = {"q_pos": q.positions, "k_pos": k.positions, "q_segment": q.segments,
             "k_segment": k.segments, "q_index": q.index[None], "k_index": k.index[None]}
    ranks = {"heads": "scalar", "rows": "row", "columns": "column"}
    place = q.index[:, None] - k.index + S - 1

    def one(b, n):
        known = {"score": (score[b, n], "tile")}
        for name in (body.coordinates | body.floats) - {"score"}:
            x = sides[name][b if sides[name].shape[0] > 1 else 0]
            rank = "row" if name.startswith("q") else "column"
            known[name] = (x, rank)
            known[f"float {name}"] = (x.astype(jnp.float32), rank)
        given = []
        for entry, x in zip(body.handed, handed, strict=True):
            x = x[b if x.shape[0] > 1 else 0, n if x.shape[1] > 1 else 0]
            x = x[place] if entry.group == "distances" else x
            given.append((x, ranks.get(entry.group, "tile")))
        return body(known, given, lift)

    return jnp.stack([jnp.stack([one(b, n) for n in range(N)]) for b in range(B)])


@pytest.mark.parametrize("name", MODS)
def test_values_and_body_are_the_function(name):
    """What kernels compute from hoisted values equals ``on_grid``, and its gradient too."""
    s = Shape(2, 9, 9, 2, 2, 4, 4, (8, 8))
    arrays = {n: jnp.float32(x) for n, x in MODS[name].draw(s).items()}
    rows = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    side = Coords(rows, 1 + rows // 5, jnp.arange(9, dtype=jnp.int32))
    score, cotangent = (
        jax.random.normal(key, (2, 2, 9, 9)) for key in jax.random.split(jax.random.key(0))
    )

    def traced(arrays):
        return Mod.of(MODS[name].pair(arrays), score_dtype="float32").bound(2, 2)

    def grid(arrays, score):
        return jnp.broadcast_to(traced(arrays).on_grid(side, side, score), score.shape)

    def tiles(arrays, score):
        mod = traced(arrays)
        body = split(mod.program, 9, 9)
        assert body.refusal is None, body.refusal
        return on_tiles(body, values(mod, body, side, side), side, side, score)

    results = []
    for f in (grid, tiles):
        out, pull = jax.vjp(f, arrays, score)
        alive = jnp.isfinite(out)
        results.append((jnp.where(alive, out, -1e3), pull(jnp.where(alive, cotangent, 0))))
    expected, found = results
    close(found[0], expected[0], kind="op", name="values")
    for n in arrays:
        close(found[1][0][n], expected[1][0][n], kind="gradient", name=n)
    close(found[1][1], expected[1][1], kind="gradient", name="score")


def test_rows_may_share_coordinates():
    """Coordinates ``[1, T]`` beside the numbers of several rows, as block lists pass them."""
    row = Coords(jnp.arange(5)[None], None, jnp.arange(5))
    mod = Mod.of(lambda h, q, k, *, batch: q + batch > k).bound(3, 2)
    expected = np.arange(5)[:, None] + np.arange(3)[:, None, None] > np.arange(5)
    np.testing.assert_array_equal(mod.on_grid(row, row)[:, 0], expected)


def test_numbers_of_a_shard():
    """``at`` says which rows and heads are at hand; ``bound`` keeps them."""
    mod = Mod.of(lambda h, q, k, *, batch: (h == 5) & (batch == 3)).at(
        batch=np.array([3, 1]), heads=np.array([4, 5, 6])
    ).bound(2, 3)
    row = Coords(jnp.zeros((2, 1), jnp.int32), None, jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(mod.on_grid(row, row)[:, :, 0, 0], [[0, 1, 0], [0, 0, 0]])
    with pytest.raises(ShapeError, match=r"is bound to heads of shape \(3,\): the call has 4"):
        mod.bound(2, 4)


# What attention() says -------------------------------------------------------------------------


def _qkv(dtype="float32"):
    return [jnp.zeros((2, 4, n, 8), dtype) for n in (4, 2, 2)]


def _branch(s, h, q, k):
    return s if q > k else 0 * s


BF16 = jnp.ones(4, jnp.bfloat16)
COMPLEX = jnp.ones(4, jnp.complex64)


@pytest.mark.parametrize("options, error, message", [
    (
        {"score_mod": lambda score, b, h, q, k: score}, ConfigError,
        r"score_mod takes \(score, b, h, q, k\): is called with \(score, head, q_pos, k_pos\)",
    ),
    ({"score_mod": lambda s, h, q: s}, ConfigError, r"score_mod takes \(s, h, q\)"),
    ({"score_mod": lambda s, h, q, k, *, bias: s}, ConfigError, "and the keywords it names a"),
    (
        {"score_mod": lambda score, batch, head, q_pos: score}, ConfigError,
        r"score_mod takes \(score, batch, head, q_pos\)",
    ),
    ({"score_mod": lambda *, score, head, q_pos, k_pos: score}, ConfigError, "score_mod takes"),
    ({"score_mod": lambda s, h, q, k: s > 0}, ConfigError, r"score_mod returns bool\[\]: must"),
    ({"score_mod": lambda s, h, q, k: SLOPE * s}, ConfigError, r"score_mod returns float32\[4\]"),
    ({"score_mod": lambda s, h, q, k: (s, s)}, ConfigError, "score_mod returns tuple: must return"),
    ({"score_mod": lambda s, h, q, k: None}, ConfigError, "score_mod returns NoneType"),
    ({"score_mod": lambda s, h, q, k: s * 1j}, ConfigError, r"score_mod returns complex64\[\]"),
    ({"score_mod": _branch}, ConfigError, "score_mod _branch branches in Python on a sco"),
    ({"score_mod": 3.0}, ConfigError, "score_mod is a float: must be a function of a pair"),
    (
        {"score_mod": lambda s, h, q, k: s + BF16[h]}, DtypeError,
        r"captures bfloat16\[4\]: floating arrays are captured in softmax_dtype = float32, .*"
        r"x.astype\(jnp.float32\)",
    ),
    (
        {"score_mod": lambda s, h, q, k: s + COMPLEX[h].real}, DtypeError,
        r"captures complex64\[4\]: captured arrays are real",
    ),
    (
        {"score_mod": lambda s, h, q, k, *, q_segment: s * q_segment}, ConfigError,
        "reads q_segment: the call has none. Fix: pass segments=",
    ),
    (
        {"score_mod": Mod.of(lambda h, q, k: q > k)}, ConfigError,
        "traced for a mask: the scores are float32",
    ),
    ({"mask": lambda h, q, k: q - k}, ConfigError, r"mask_mod returns int32\[\]: must return"),
    ({"mask": lambda h, q, k: 1.0 * q}, ConfigError, r"mask_mod returns float32\[\]: must return"),
    ({"mask": lambda b, h, q, k: q > k}, ConfigError, r"mask_mod takes \(b, h, q, k\): is called"),
    ({"mask": lambda q_pos, k_pos, head: q_pos > k_pos}, ConfigError, "mask_mod takes"),
    ({"mask": lambda h, q, k: q > k and h > 0}, ConfigError, "mask_mod <lambda> branches in Pyth"),
    (
        {"mask": Causal() & MaskMod.of(lambda h, q, k, *, k_segment: k_segment > 1)}, ConfigError,
        "reads k_segment: the call has none",
    ),
    ({"mask": jnp.ones((4, 4), bool)}, ConfigError, "mask is a ArrayImpl: must be a mask or a"),
    ({"mask": Blocks(jnp.zeros((1, 1, 3, 1), jnp.int32), 3, 3)}, ShapeError, r"\[2 or 1, 4 or 1, "),
    ({"mask": Blocks(jnp.zeros((1, 1, 2, 1)), 2, 2)}, DtypeError, "Blocks.lists has dtype float32"),
])
def test_bad_functions(options, error, message):
    with pytest.raises(error, match=message):
        attention(*_qkv(), **options)


def test_float64_must_agree():
    with enable_x64():
        slope = jnp.ones(4)
        with pytest.raises(DtypeError, match=r"captures float64\[4\]: .* softmax_dtype = float32"):
            attention(*_qkv(), score_mod=lambda s, h, q, k: s + slope[h])
        narrow = jnp.ones(4, jnp.float32)
        with pytest.raises(DtypeError, match=r"captures float32\[4\].*jnp.float64"):
            attention(
                *_qkv(), score_mod=lambda s, h, q, k: s + narrow[h], softmax_dtype="float64"
            )


def test_no_keys():
    q, k, v = _qkv()
    places = jnp.zeros((2, 4), jnp.int32), jnp.zeros((2, 0), jnp.int32)
    with pytest.raises(ShapeError, match="S = 0: there is nothing to attend to"):
        attention(q, k[:, :0], v[:, :0], positions=places)


@pytest.mark.parametrize("impl, device", [
    ("cudnn", Device("gpu", "NVIDIA H200")), ("tokamax", Device("gpu", "NVIDIA H200")),
    ("splash", Device("tpu", "TPU v5 lite")),
])
def test_vendors_refuse_a_score_mod(impl, device):
    program = Mod.of(lambda s, h, q, k: s, score_dtype="float32").program
    call = Call(
        2, 1024, 1024, 8, 8, 64, 64, "bfloat16", Causal(), "full", False, False, None, False,
        device, score=program,
    )
    with pytest.raises(ImplementationError, match="a score_mod is not served"):
        OP.choose(call, impl)


def test_blocks_under_or_beside_others_are_a_reason_not_a_crash():
    """Comparing masks must not compare their arrays."""
    lists = jnp.zeros((1, 1, 8, 2), jnp.int32)
    one, two = Blocks(lists, 128, 128), Blocks(lists + 1, 128, 128)
    for mask in ((one & two), (one | Window(3)) & two):
        call = Call(
            2, 1024, 1024, 8, 8, 64, 64, "bfloat16", mask, "full", False, False, None, False,
            Device("gpu", "NVIDIA H200"),
        )
        assert isinstance(OP.implementations["gpu"].supports(call), str)
