"""Rows of any tokens and heads: against attention, and against a computation row by row."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flex_cases import bucket
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.dispatch import Device, Implementation, compiling_for
from attnlab.core.errors import ConfigError, DtypeError, ImplementationError, ShapeError
from attnlab.core.mask import (
    Blocks,
    Causal,
    Coords,
    Full,
    MaskMod,
    Prefix,
    Segments,
    SinkTokens,
    Window,
)
from attnlab.core.mods import Mod
from attnlab.core.versions import JAX, enable_x64
from attnlab.ops.attention import OP, attention, gpu, plan, reference, tpu, tpu_blocks, xla
from attnlab.ops.attention.blocks import FULL, NONE, PARTIAL, block_lists
from attnlab.ops.attention.packed_rows import every_row
from attnlab.ops.attention.rows import _by_head, _with_sinks, attention_rows
from attnlab.testing.budget import close, close_trees

B, K, R, S, H, V, N = 2, 2, 21, 30, 8, 4, 6
G = N // K
PARAMETERS = {
    "q": (B, K, R, H), "k": (B, S, K, H), "v": (B, S, K, V), "sinks": (N,), "slope": (N,),
    "row": (B, N, R), "column": (B, S), "shared": (32,), "table": (N, 32), "bias": (N, S),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: (8, 8))


# Written once: they are traced by the op, and evaluated on whole arrays by the oracle.
SCORES = {
    "none": None,
    "slopes": lambda a: lambda s, h, q, k: s + a["slope"][h] * (k - q),
    "tokens": lambda a: lambda s, h, q, k, *, batch, q_index, k_index: (
        s * a["row"][batch, h, q_index] + a["column"][batch, k_index]
    ),
    "tables": lambda a: lambda s, h, q, k: (
        s + a["shared"][bucket(q - k)] + a["table"][h, bucket(k - q)]
    ),
    "keys of heads": lambda a: lambda s, h, q, k, *, k_index, q_segment, k_segment: jnp.where(
        q_segment + k_segment == 2, jnp.sin(s) + a["bias"][h, k_index], s * a["slope"][h]
    ),
}


def striped(h, q, k, *, batch, q_index):
    return (q - k + h + batch + q_index) % 3 > 0


MASKS = {
    "causal": (None, lambda c: c["q_pos"] >= c["k_pos"]),
    "prefixes": (
        Causal() & Window(9) | Prefix(np.array([3, 0])),
        lambda c: (c["q_pos"] - c["k_pos"] < 9) & (c["q_pos"] >= c["k_pos"])
        | (c["k_pos"] < jnp.array([3, 0])[c["batch"]]),
    ),
    "by head": (
        (Causal() | MaskMod.of(lambda h, q, k: h == 1)) & MaskMod.of(striped),
        lambda c: ((c["q_pos"] >= c["k_pos"]) | (c["head"] == 1)) & striped(
            c["head"], c["q_pos"], c["k_pos"], batch=c["batch"], q_index=c["q_index"]
        ),
    ),
}


def grids(places: dict) -> dict:
    """Coordinates of all pairs, each broadcasts to ``[B, K, R, S]``."""
    sides = {}
    for name, short in (("positions", "pos"), ("segments", "segment")):
        rows, keys = places[name]
        sides |= {f"q_{short}": rows[..., None], f"k_{short}": keys[:, None, None]}
    index = places.get("index")
    index = jnp.broadcast_to(jnp.arange(R), (B, K, R)) if index is None else index
    return sides | {
        "head": places["heads"][..., None], "batch": np.arange(B)[:, None, None, None],
        "q_index": index[..., None], "k_index": np.arange(S),
    }


def scores(mod: str, a: dict, z, c: dict):
    if SCORES[mod] is None:
        return z
    function = SCORES[mod](a)
    names = list(inspect.signature(function).parameters)[4:]
    return function(z, c["head"], c["q_pos"], c["k_pos"], **{n: c[n] for n in names})


def dense(a: dict, places: dict, mod: str, mask: str, options: dict):
    """``(o, lse)`` by the equation, all pairs at once."""
    c = grids(places)
    z = options.get("scale", H**-0.5) * jnp.einsum("bkrh,bskh->bkrs", a["q"], a["k"])
    if cap := options.get("logit_cap"):
        z = cap * jnp.tanh(z / cap)
    z = scores(mod, a, z, c)
    seen = (c["q_segment"] == c["k_segment"]) & (c["q_segment"] > 0)
    first = (c["k_pos"] < options.get("sink_tokens", 0)) & (c["q_pos"] >= c["k_pos"])
    seen = jnp.broadcast_to(seen & (MASKS[mask][1](c) | first), z.shape)
    z = jnp.where(seen, z, -1e30)
    e = jnp.where(seen, jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True))), 0)
    top = jax.lax.stop_gradient(z.max(-1))
    total = e.sum(-1)
    some = total > 0
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
    o = jnp.einsum("bkrs,bskv->bkrv", e / jnp.where(some, total, 1)[..., None], a["v"])
    if options.get("sinks"):
        sink = a["sinks"][places["heads"]]
        whole = jnp.where(some, jnp.exp(jnp.where(some, lse, 0)), 0) + jnp.exp(sink)
        o = o * (1 - jnp.exp(sink) / whole)[..., None]
        lse = jnp.log(whole)
    return o, lse


def brute(a: dict, places: dict, mod: str, mask: str, options: dict):
    """The same, one row after another, in NumPy."""
    o, lse = np.zeros((B, K, R, V)), np.full((B, K, R), -np.inf)
    a = jax.tree.map(np.asarray, a)
    every = {n: np.broadcast_to(x, (B, K, R, S)) for n, x in grids(places).items()}
    for at in np.ndindex(B, K, R):
        c = {n: x[at] for n, x in every.items()}
        z = options.get("scale", H**-0.5) * (a["k"][at[0], :, at[1]] @ a["q"][at])
        if cap := options.get("logit_cap"):
            z = cap * np.tanh(z / cap)
        z = np.asarray(scores(mod, a, z, c))
        first = (c["k_pos"] < options.get("sink_tokens", 0)) & (c["q_pos"] >= c["k_pos"])
        seen = (np.asarray(MASKS[mask][1](c)) | first) & (c["q_segment"] > 0)
        seen &= c["q_segment"] == c["k_segment"]
        z, v = z[seen], a["v"][at[0], seen, at[1]]
        if options.get("sinks"):
            z, v = np.append(z, a["sinks"][c["head"][0]]), np.append(v, np.zeros((1, V)), 0)
        if len(z):
            lse[at] = np.logaddexp.reduce(z)
            o[at] = np.exp(z - lse[at]) @ v
    return o, lse


def arrays(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    a = {n: np.float32(rng.standard_normal(shape)) for n, shape in PARAMETERS.items()}
    return a | {"slope": a["slope"] * np.float32(0.1)}


def ragged(seed: int, segments: int = 3, spread: int = 40, ordered: bool = False) -> dict:
    """Any heads of the group, any positions, segments with padding, and an index by token."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, G, (B, K, R)) + G * np.arange(K)[:, None]
    places = {"heads": own, "index": rng.integers(0, R, (B, K, R))}
    for name, most in (("positions", spread), ("segments", segments + 1)):
        sides = tuple(rng.integers(0, most, shape) for shape in ((B, K, R), (B, S)))
        places[name] = tuple(np.sort(x, -1) for x in sides) if ordered else sides
    return jax.tree.map(np.int32, places)


def pulled(f, a, cotangents):
    (o, lse), pull = jax.vjp(f, a)
    do, dlse = cotangents
    return {"o": o, "lse": lse, "d": pull((do.astype(o.dtype), dlse.astype(lse.dtype)))[0]}


@functools.cache
def compiled(mod: str, mask: str, options: tuple, impl: str, dtype: str = "float32"):
    def run(a, places, cotangents):
        def f(a):
            more = dict(options)
            sinks = a["sinks"] if more.pop("sinks", False) else None
            score = SCORES[mod] and SCORES[mod](a)
            return attention_rows(
                a["q"], a["k"], a["v"], num_heads=N, mask=MASKS[mask][0], score_mod=score,
                sink_logits=sinks, return_lse=True, softmax_dtype=dtype, impl=impl, **places, **more
            )

        return pulled(f, a, cotangents)

    return jax.jit(run)


@functools.cache
def exact(mod: str, mask: str, options: tuple):
    def run(a, places, cotangents):
        return pulled(lambda a: dense(a, places, mod, mask, dict(options)), a, cotangents)

    return jax.jit(run)


def compare(found: dict, expected: dict, dtype: str = "float32") -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        close(x, y, dtype=dtype, kind="gradient" if "'d'" in name else "op", name=name)


def check(seed, places, mod, mask, options, impl, dtype="float32") -> None:
    a = arrays(seed)
    rng = np.random.default_rng(seed + 1)
    do, dlse = rng.standard_normal((B, K, R, V)), rng.standard_normal((B, K, R))
    with enable_x64(True):
        wide = jax.tree.map(np.float64, a)
        expected = jax.tree.map(np.asarray, exact(mod, mask, options)(wide, places, (do, dlse)))
        by_row = brute(wide, places, mod, mask, dict(options))
    with enable_x64(dtype == "float64"):
        a = jax.tree.map(lambda x: x.astype(dtype), a)
        run = compiled(mod, mask, options, impl, dtype)
        found = jax.tree.map(np.asarray, run(a, places, (do, dlse)))
    close(expected["o"], by_row[0], dtype="float64", kind="op", name="the oracle itself, o")
    close(expected["lse"], by_row[1], dtype="float64", kind="op", name="the oracle itself, lse")
    compare(found, expected, dtype)
    empty = np.isneginf(by_row[1]) | (places["segments"][0] == 0)
    assert (found["o"][empty] == 0).all() and (found["d"]["q"][empty] == 0).all()


CASES = [
    ("none", "causal", ()),
    ("slopes", "causal", (("sinks", True),)),
    ("tokens", "by head", (("logit_cap", 2.0), ("sink_tokens", 2))),
    ("tables", "prefixes", (("sinks", True), ("scale", 0.7))),
    ("keys of heads", "by head", (("sinks", True), ("logit_cap", 3.0))),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**20), segments=st.integers(1, 4), ordered=st.booleans(),
    spread=st.sampled_from([1, 30, 500]),
)
def test_ragged_rows(case, seed, segments, ordered, spread):
    """Any heads, positions and documents, rows without keys, padding: everything's gradient."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "tile_sizes", lambda *_: (8, 8))
        check(seed, ragged(seed, segments, spread, ordered), *case, "xla")


@pytest.mark.parametrize("case", CASES[2:], ids=lambda case: f"{case[0]}, {case[1]}")
def test_ragged_rows_of_the_reference_and_in_float64(case):
    check(5, ragged(5), *case, "reference")
    check(6, ragged(6), *case, "xla", "float64")


def test_no_segments_and_no_index():
    places = ragged(7) | {"segments": (np.ones((B, K, R), np.int32), np.ones((B, S), np.int32))}
    given = {n: x for n, x in places.items() if n not in ("segments", "index")}
    a, cotangents = arrays(7), (np.ones((B, K, R, V)), np.ones((B, K, R)))
    found = compiled("tokens", "causal", (), "xla")(a, given, cotangents)
    with enable_x64(True):
        wide = jax.tree.map(np.float64, a)
        expected = exact("tokens", "causal", ())(wide, places | {"index": None}, cotangents)
    compare(found, expected)


@pytest.mark.parametrize(
    "N, K, impl",
    [(1, 1, "xla"), (4, 4, "xla"), (6, 2, "xla"), (128, 1, "xla"), (6, 2, "reference")],
)
def test_every_head_of_every_token_is_attention(N, K, impl):
    T = 13 if N > 8 else 20
    keys = iter(jax.random.split(jax.random.key(N), 12))
    shapes = {
        "q": (2, T, N, 8), "k": (2, T, K, 8), "v": (2, T, K, 4), "sinks": (N,), "slope": (N,),
        "gate": (2, N, T), "table": (N, 32),
    }
    a = {name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    cut = jnp.array([[7], [T - 3]])
    place = jnp.broadcast_to(jnp.arange(T), (2, T))
    segments = jnp.where(place < cut, 1, jnp.where(place < T - 2, 2, 0))
    positions = jnp.where(place < cut, place, place - cut)
    options = dict(
        mask=Causal() & (Window(6) | MaskMod.of(lambda h, q, k: (k + h) % 4 == 0)), impl=impl,
        sink_tokens=1, logit_cap=3.0, return_lse=True,
    )

    def mod(a):
        return lambda s, h, q, k, *, batch, q_index, k_index: (
            s * jnp.tanh(a["gate"][batch, h, q_index]) + a["gate"][batch, h, k_index]
            + a["slope"][h] * (k - q) + a["table"][h, bucket(q - k)]
        )

    def whole(a):
        return attention(
            a["q"], a["k"], a["v"], score_mod=mod(a), sink_logits=a["sinks"], positions=positions,
            segments=segments, **options,
        )

    def by_rows(a):
        rows = every_row(2, T, N, K)
        o, lse = attention_rows(
            rows.take(a["q"]), a["k"], a["v"], num_heads=N, score_mod=mod(a),
            sink_logits=a["sinks"], **rows.keywords(positions, segments), **options,
        )
        return rows.put(o), rows.put(lse)

    cotangents = [jax.random.normal(next(keys), (2, T, N, *tail)) for tail in ((4,), ())]
    runs = [jax.jit(lambda a, f=f: pulled(f, a, cotangents))(a) for f in (by_rows, whole)]
    compare(*runs)


def test_causality_token_by_token():
    """No row sees a key behind its position, and every row sees the one at it."""
    a, places = arrays(3), ragged(3, segments=1)
    places["segments"] = (np.ones((B, K, R), np.int32), np.ones((B, S), np.int32))
    places["positions"] = (places["positions"][0] % S, np.tile(np.int32(np.arange(S)), (B, 1)))
    run, where = compiled("slopes", "causal", (("sinks", True),), "xla"), places["positions"][0]
    for token in range(S):
        here = np.float32(where == token)
        found = run(a, places, (here[..., None] * np.ones(V, np.float32), here))["d"]
        for name in "kv":
            assert (found[name][:, token + 1 :] == 0).all(), (name, token)
            groups = np.abs(found[name][:, token]).max(-1) > 0
            assert (groups == (here.max(-1) > 0)).all(), (name, token)


def test_sinks_without_keys_and_keys_without_sinks():
    """Values and gradients of the four corners, with cotangents everywhere."""
    lse = jnp.array([-jnp.inf, -jnp.inf, 0.5, 0.5, 90.0, -90.0])
    sink = jnp.array([-jnp.inf, 1.5, -jnp.inf, 1.5, -90.0, 90.0])
    o = jnp.where(lse > -jnp.inf, 2.0, 0.0)[:, None]
    (found, total), pull = jax.vjp(_with_sinks, o, lse, sink)
    do, dlse, dsink = pull((jnp.ones_like(o), jnp.ones_like(lse)))
    share = jax.nn.sigmoid(-1.0)
    close(found[:, 0], np.array([0, 0, 2, 2 * share, 2, 0]))
    close(total, np.array([-np.inf, 1.5, 0.5, np.logaddexp(0.5, 1.5), 90, 90]))
    close(do[:, 0], np.array([0, 0, 1, share, 1, 0]))
    slope = 2 * share * (1 - share)
    close(dlse, np.array([0, 0, 1, share + slope, 1, 0]))
    close(dsink, np.array([0, 1, 0, 1 - share - slope, 0, 1]))


def test_gradients_of_sinks_are_not_scattered():
    heads = jnp.zeros((B, K, R), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(lambda x: _by_head(x, heads).sum()))(jnp.ones(N)))
    assert "scatter" not in text and "reduce_sum" in text


def test_tiles_of_packed_heads_are_a_triangle():
    rows = every_row(1, 64, 8, 2)
    at = rows.keywords(jnp.arange(64)[None])["positions"]
    q, k = Coords(at[0][0], None, jnp.arange(256)), Coords(at[1], None, jnp.arange(64))
    lists = block_lists(Causal(), q, k, block_q=64, block_k=16)
    expected = np.select([np.tri(4, k=-1) > 0, np.eye(4) > 0], [FULL, PARTIAL], NONE)
    assert (lists.kinds(4) == expected).all()


# Kernels, interpreted -------------------------------------------------------------------------


def kernel_case(dtype, name: str):
    """Packed rows of two groups with padding, slopes and values by token, sinks and a cap."""
    T, N, K, H = 50, 6, 2, 64
    keys = iter(jax.random.split(jax.random.key(1), 8))
    shapes = {
        "q": (1, T, N, H), "k": (1, T, K, H), "v": (1, T, K, H), "slope": (N,), "sinks": (N,),
        "gate": (1, N, T),
    }
    a = {n: jax.random.normal(next(keys), shape) for n, shape in shapes.items()}
    a = {n: x.astype(dtype).astype(jnp.float32) if n in "qkv" else x for n, x in a.items()}
    cotangents = [jax.random.normal(next(keys), (1, T, N, *tail)) for tail in ((H,), ())]
    segments = jnp.asarray(np.repeat([1, 2, 0], [31, 15, 4]))[None]
    positions = jnp.asarray(np.r_[:31, :15, :4])[None]

    def mod(a):
        return lambda s, h, q, k, *, batch, q_index: (
            s * jnp.tanh(a["gate"][batch, h, q_index]) + 0.1 * a["slope"][h] * (k - q)
        )

    def f(a, kernel: bool):
        options = dict(
            score_mod=mod(a), sink_logits=a["sinks"], logit_cap=5.0, return_lse=True,
            mask=Causal() & (Window(20) | MaskMod.of(lambda h, q, k: k == h)),
        )
        if not kernel:
            return attention(
                a["q"], a["k"], a["v"], positions=positions, segments=segments, **options,
                impl="reference",
            )
        rows, (q, k, v) = every_row(1, T, N, K), (a[n].astype(dtype) for n in "qkv")
        o, lse = attention_rows(
            rows.take(q), k, v, num_heads=N, impl=name, **rows.keywords(positions, segments),
            **options,
        )
        return rows.put(o), rows.put(lse)

    def run(kernel):
        return jax.jit(lambda a: pulled(lambda a: f(a, kernel), a, cotangents))(a)

    return run(True), run(False)


def install(monkeypatch, name: str, forward, **options) -> None:
    one = Implementation(name, lambda call: None, functools.partial(forward, **options))
    monkeypatch.setitem(OP.implementations, name, one)


@pytest.mark.skipif(JAX < (0, 11, 2), reason="Mosaic GPU kernels need jax >= 0.11.2")
def test_the_hopper_kernels_interpreted(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    install(monkeypatch, "interpreted", gpu.forward, interpret=interpret)
    found, expected = kernel_case("bfloat16", "interpreted")
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        x, y = (np.asarray(x, np.float64) for x in (x, y))
        assert (np.isfinite(x) == np.isfinite(y)).all(), path
        x, y = (np.nan_to_num(x, neginf=0) for x in (x, y))
        error = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error < 1e-2, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def test_the_tpu_kernels_interpreted(monkeypatch):
    def small(T, S, H, V, dtype, mask):
        return tpu_blocks.dividing(mask, T + -T % 16 if T < 128 else 128, 128)

    monkeypatch.setattr(tpu_blocks, "forward_blocks", small)
    monkeypatch.setattr(tpu_blocks, "backward_blocks", lambda T, *rest: small(max(T, 128), *rest))
    install(monkeypatch, "interpreted", tpu.forward, interpret=True)
    compare(*kernel_case("float32", "interpreted"))


@pytest.mark.parametrize(
    "mod, groups, reason",
    [
        ("slopes", 3, None), ("tokens", 3, None), ("none", 1, None),
        ("tables", 3, "query and key together"), ("keys of heads", 3, "query and key together"),
        ("keys of heads", 1, None),  # the group settles the head
    ],
)
@pytest.mark.parametrize("device", [Device("gpu", "NVIDIA H200"), Device("tpu", "TPU v5 lite")])
def test_what_the_kernels_serve(mod, groups, reason, device, monkeypatch):
    monkeypatch.setattr(gpu, "JAX", (0, 11, 2))
    kernel = dataclasses.replace(OP.implementations[device.platform], forward=reference.forward)
    monkeypatch.setitem(OP.implementations, device.platform, kernel)
    N, T = 2 * groups, 256
    sizes = {"row": (1, N, T), "column": (1, T), "bias": (N, T)}
    a = {n: jnp.ones(s) for n, s in (PARAMETERS | sizes).items() if n not in "qkv"}
    rows = every_row(1, T, N, 2)
    seg, k = jnp.ones((1, T), jnp.int32), jnp.ones((1, T, 2, 64), "bfloat16")

    def run(impl):
        return attention_rows(
            jnp.ones((1, 2, T * groups, 64), "bfloat16"), k, k, num_heads=N,
            score_mod=SCORES[mod] and SCORES[mod](a), impl=impl,
            **rows.keywords(jnp.arange(T)[None], seg),
        )

    with compiling_for(device):
        if reason is None:
            jax.eval_shape(lambda: run(device.platform))
            return
        with pytest.raises(ImplementationError, match=reason):
            jax.eval_shape(lambda: run(device.platform))


# Bad arguments --------------------------------------------------------------------------------


def arguments(**changes):
    a, places = arrays(0), ragged(0)
    return {n: a[n] for n in "qkv"} | {"num_heads": N} | places | changes


TWO = np.zeros((B, K, R, 2, 2), np.float32)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": TWO}, ShapeError, r"must be \[B, K, R, H\], \[B, S, K, H\]"),
        ({"k": arrays(0)["v"]}, ShapeError, r"must be \[B, K, R, H\]"),
        ({"v": np.zeros((B, S, 1, V), "f4")}, ShapeError, r"\[B, S, K, V\]"),
        ({"v": np.zeros((B, S, K, V), "f2")}, DtypeError, "must agree"),
        ({"num_heads": 5}, ShapeError, "num_heads = 5 over K = 2"),
        ({"num_heads": 4}, ConfigError, r"heads\[.*the heads of group . are"),
        ({"heads": np.zeros((B, K, R), np.int32)}, ConfigError,
         r"heads\[0, 1, 0\] = 0: the heads of group 1 are 3 to 5"),
        ({"heads": np.zeros((B, R), np.int32)}, ShapeError, "heads has shape"),
        ({"heads": np.zeros((B, K, R))}, DtypeError, "heads has dtype float64"),
        ({"index": np.zeros((B, R), np.int32)}, ShapeError, "index has shape"),
        ({"positions": np.zeros((B, S), np.int32)}, ConfigError, "rows and keys have their own"),
        ({"positions": ragged(0)["positions"][::-1]}, ShapeError, "row positions has shape"),
        ({"segments": (np.zeros((B, K, R)),) * 2}, DtypeError, "row segments has dtype"),
        ({"segments": None, "mask": Segments()}, ConfigError, "segments = None"),
        ({"mask": Blocks(np.zeros((1, 1, 3, 1), np.int32), 8, 8)}, ConfigError,
         "mask is a Blocks: its lists are of blocks of tokens"),
        ({"mask": Causal() | Blocks(np.zeros((1, 1, 3, 1), np.int32), 8, 8)}, ConfigError,
         "mask is a Blocks"),
        ({"mask": plan(batch=B, heads=N, length=R)}, ConfigError, "mask is a Planned"),
        ({"mask": 3}, ConfigError, "mask is a int"),
        ({"mask": Prefix(np.zeros(3, np.int32))}, ShapeError, "Prefix.length has shape"),
        ({"mask": MaskMod(Mod.of(striped).at(heads=np.arange(4)))}, ShapeError, "the call has 6"),
        ({"score_mod": 3}, ConfigError, "score_mod is a int"),
        ({"sink_logits": np.zeros(3, np.float32)}, ShapeError, r"must be \[N\] = \(6,\)"),
        ({"logit_cap": -1.0}, ConfigError, "logit_cap = -1.0"),
        ({"impl": "splash"}, ImplementationError, "splash"),
    ],
)
def test_bad_arguments_raise(changes, error, message):
    with pytest.raises(error, match=message):
        attention_rows(**arguments(**changes))


def test_numbers_of_rows_and_heads_of_a_shard():
    """A function told which heads are at hand: two shards, one group each, are the whole call."""
    a, places = arrays(9), ragged(9)

    def mod(s, h, q, k, *, batch):
        return s + jnp.cos(1.0 * h * k + batch)

    def mask(h, q, k):
        return (q >= k) & ((q + h) % 3 > 0)

    def call(kappa, score, mask):
        cut = {"q": a["q"][:, kappa], "k": a["k"][:, :, kappa], "v": a["v"][:, :, kappa]}
        sides = {n: (x[0][:, kappa], x[1]) for n, x in places.items() if isinstance(x, tuple)}
        first = kappa.start or 0
        heads = places["heads"][:, kappa] - first * G
        return attention_rows(
            **cut, **sides, heads=heads, num_heads=heads.shape[1] * G, mask=mask, score_mod=score,
            return_lse=True,
        )

    whole = jax.jit(lambda: call(slice(None), mod, mask))()
    for i in range(K):
        at = dict(heads=np.arange(i * G, (i + 1) * G), batch=np.arange(B))
        score = Mod.of(mod, score_dtype="float32").at(**at)
        part = jax.jit(
            lambda i=i, score=score, at=at: call(
                slice(i, i + 1), score, MaskMod(Mod.of(mask).at(**at))
            )
        )()
        close_trees(part, tuple(x[:, i : i + 1] for x in whole), name=f"group {i}")


def test_sink_tokens_and_full():
    a, places = arrays(11), ragged(11)
    options = dict(num_heads=N, return_lse=True, **places)
    qkv = a["q"], a["k"], a["v"]
    close_trees(
        attention_rows(*qkv, mask=Window(3), sink_tokens=2, **options),
        attention_rows(*qkv, mask=(Window(3) & Full()) | SinkTokens(2), **options),
    )
