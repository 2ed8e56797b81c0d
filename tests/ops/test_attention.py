"""Every implementation against the dense reference in fp64: values, lse and all gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.mask import Blocks, Causal, Full, Mask, Prefix, SinkTokens, Window
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import attention, xla
from attnlab.testing.budget import close, identical

LISTS = np.array([[0, 1, -1], [1, 4, -1], [2, 0, 4], [3, 3, -1], [-1, -1, -1]], np.int32)
PACKED = [(1, 14), (7, 1), (3, 17), (0, 5)], [(2, 37)]  # (segment, length); 37 tokens a row


@dataclasses.dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 37
    S: int = 37
    N: int = 4
    K: int = 2
    H: int = 8
    V: int = 8
    mask: Mask = dataclasses.field(default_factory=Causal)
    positions: str = "own"  # own: 0.. a document; odd: unordered; apart: queries before all keys
    packed: bool = False
    sink_logits: bool = False
    tiles: tuple[int, int] | None = (16, 16)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v, sink_logits and the cotangents of o and lse."""
        rng = np.random.default_rng(0)
        B, T, S, N, K, H, V = (getattr(self, name) for name in "BTSNKHV")
        shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, V), "sink_logits": (N,)}
        shapes |= {"do": (B, T, N, V), "dlse": (B, T, N)}
        return {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    @property
    def coordinates(self) -> dict[str, Any]:
        rng = np.random.default_rng(1)
        if self.packed:
            positions = [np.concatenate([np.arange(n) for _, n in row]) for row in PACKED]
            segments = [np.concatenate([np.full(n, s) for s, n in row]) for row in PACKED]
            return {"positions": np.int32(positions), "segments": np.int32(segments)}
        if self.positions == "odd":
            return {
                "positions": tuple(
                    rng.integers(0, 50, (self.B, n)).astype(np.int32) for n in (self.T, self.S)
                ),
                "segments": tuple(
                    rng.integers(0, 3, (self.B, n)).astype(np.int32) for n in (self.T, self.S)
                ),
            }
        # Queries are the last T of the S tokens; "apart": most of them stand before every key.
        first = self.S - self.T if self.positions == "own" else -30
        rows = np.arange(self.T) + first, np.arange(self.S)
        return {"positions": tuple(np.int32(np.broadcast_to(r, (self.B, len(r)))) for r in rows)}


CASES = {
    "causal": Case(),
    "full_V_wider": Case(mask=Full(), V=12),
    "mha_V_narrower": Case(K=4, V=4),
    "mqa": Case(K=1),
    "whole_tiles": Case(T=32, S=32),
    "more_queries": Case(S=11, positions="apart"),
    "one_query": Case(T=1, S=37),
    "one_token": Case(T=1, S=1),
    "one_tile": Case(tiles=(64, 64)),
    "default_tiles": Case(tiles=None, packed=True),
    "one_key_tile": Case(tiles=(16, 64), sink_logits=True),
    "one_query_tile": Case(tiles=(64, 16), options={"logit_cap": 2.0}),
    "odd_positions": Case(positions="odd"),
    "window": Case(mask=Causal() & Window(5)),
    "window_1": Case(mask=Causal() & Window(1)),
    "window_ahead": Case(mask=Window(7, ahead=3)),
    "sinks": Case(mask=Causal() & Window(6), options={"sink_tokens": 2}),
    "prefix_lm": Case(mask=Causal() | Prefix(np.array([20, 3]))),
    "blocks": Case(mask=Causal() & Blocks(jnp.asarray(LISTS)[None, None], 8, 8)),
    "blocks_of_heads": Case(
        mask=Blocks(jnp.asarray((LISTS + np.arange(8).reshape(2, 4, 1, 1)) % 5), 8, 8)
    ),
    "logit_cap": Case(options={"logit_cap": 1.5, "scale": 2.0}),
    "sink_logits": Case(sink_logits=True),
    "packed": Case(packed=True),
    "empty_rows": Case(positions="apart"),
    "empty_rows_sink_logits": Case(positions="apart", sink_logits=True),
    "nothing_visible": Case(mask=Prefix(0)),
    "everything": Case(
        packed=True, sink_logits=True, V=12,
        mask=(Causal() & (Window(6) | SinkTokens(2))) | Prefix(3),
        options={"logit_cap": 3.0, "scale": 0.7},
    ),
}
BF16 = ("causal", "one_tile", "window", "packed", "empty_rows", "everything")
FP64 = ("packed", "empty_rows", "everything")


@pytest.fixture
def tile(monkeypatch):
    """Force the tiles of a case."""

    def force(tiles):
        if tiles is not None:
            monkeypatch.setattr(xla, "tile_sizes", lambda *shape: tiles)

    return force


def compute(case: Case, impl: str, dtype: str, inputs: str | None = None):
    """o, lse and the gradients; ``inputs``: the dtype that the numbers are first rounded to."""
    with enable_x64(dtype == "float64"):
        wide = "float64" if dtype == "float64" else "float32"
        cast = {"dlse": wide, "sink_logits": wide}
        a = {
            name: jnp.asarray(x, cast.get(name, inputs or dtype)).astype(cast.get(name, dtype))
            for name, x in case.arrays.items()
        }
        if not case.sink_logits:
            del a["sink_logits"]
        where = jax.tree.map(jnp.asarray, case.coordinates)

        def run(a, where):
            a = dict(a)
            cotangents = a.pop("do"), a.pop("dlse")

            def f(a):
                return attention(
                    **a, **where, mask=case.mask, return_lse=True, softmax_dtype=wide, impl=impl,
                    **case.options,
                )

            (o, lse), pull = jax.vjp(f, a)
            return {"o": o, "lse": lse, **{f"d{n}": g for n, g in pull(cotangents)[0].items()}}

        # The reference is a handful of cached primitives; compiling it whole costs more.
        run = run if impl == "reference" else jax.jit(run)
        return jax.tree.map(np.asarray, run(a, where))


@functools.cache
def oracle(name: str, inputs: str):
    return compute(CASES[name], "reference", "float64", inputs)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, "float32") for name in CASES]
    + [(name, "bfloat16") for name in BF16]
    + [(name, "float64") for name in FP64],
)
def test_xla_within_the_error_budget(name, dtype, tile):
    case = CASES[name]
    tile(case.tiles)
    expected = oracle(name, dtype)
    found = compute(case, "xla", dtype)
    # In bf16 the budget is what the reference loses in bf16, else a share of the oracle.
    reference = compute(case, "reference", dtype) if dtype == "bfloat16" else {}
    for key in expected:
        wide = "float64" if dtype == "float64" else "float32"
        assert found[key].dtype == (wide if key in ("lse", "dsink_logits") else dtype)
        close(found[key], expected[key], reference.get(key), dtype=dtype, kind="op", name=key)


@pytest.mark.parametrize("impl", ["reference", "xla"])
@pytest.mark.parametrize("name", ["packed", "empty_rows", "nothing_visible"])
def test_empty_rows_are_zero_with_zero_gradient(name, impl, tile):
    """Their cotangents of o and lse are not zero here."""
    tile((16, 16))
    found = compute(CASES[name], impl, "float32")
    empty = np.isneginf(found["lse"])
    assert empty.any() and not (name == "nothing_visible" and not empty.all())
    assert (found["o"][empty] == 0).all() and (found["dq"][empty] == 0).all()
    for key, x in found.items():
        assert np.isfinite(x[~empty] if key == "lse" else x).all(), key
    if name == "packed":
        assert (found["dk"][0, -5:] == 0).all() and (found["dv"][0, -5:] == 0).all()


def test_an_empty_row_ignores_a_broken_cotangent():
    """exp(lse - lse') of two empty parts sends NaN back; the row must swallow it."""
    q = jnp.ones((1, 20, 1, 4))
    f = functools.partial(attention, mask=Prefix(0), impl="xla", return_lse=True)
    _, pull = jax.vjp(f, q, q, q)
    for broken in ((q, jnp.full((1, 20, 1), jnp.nan)), (q * jnp.nan, jnp.zeros((1, 20, 1)))):
        for g in pull(broken):
            assert (g == 0).all()


@pytest.mark.parametrize("tiles", [(16, 16), (64, 64)])
def test_extreme_logits(tiles, tile):
    """Logits of +-1e4: nothing overflows, and the error is that of rounding 1e4 in fp32."""
    tile(tiles)
    case = Case(options={"scale": 1e3}, sink_logits=True)
    expected = compute(case, "reference", "float64", "float32")
    found = compute(case, "xla", "float32")
    assert np.abs(expected["lse"]).max() > 5e3
    rounding = float(np.finfo(np.float32).eps) * np.abs(expected["lse"]).max()
    for key, x in found.items():
        allowed = 16 * rounding * np.abs(expected[key]).max()
        assert np.abs(x - expected[key]).max() <= allowed, key


def test_bit_for_bit_the_same_every_time(tile):
    tile((16, 16))
    first, second = (compute(CASES["everything"], "xla", "float32") for _ in range(2))
    identical(first, second)


def _loss(f):
    def loss(q, k, v):
        o, lse = f(q, k, v)
        return jnp.sin(o).sum() + jnp.cos(lse).sum()

    return loss


def _qkv(*shape):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape) for key in keys]


def _attend(impl):
    return functools.partial(
        attention, mask=Causal() & Window(9), impl=impl, return_lse=True, logit_cap=3.0
    )


def test_second_derivatives(tile):
    """The backward pass is plain JAX with the running maximum held fixed, so they are right."""
    tile((8, 8))
    qkv = _qkv(1, 9, 1, 4)

    def second(impl):
        first = jax.grad(_loss(_attend(impl)), (0, 1, 2))
        outer = jax.grad(lambda *a: sum((g**2).sum() for g in first(*a)), (0, 1, 2))
        return (jax.jit(outer) if impl == "xla" else outer)(*qkv)

    for found, expected in zip(second("xla"), second("reference")):
        close(found, expected, kind="gradient")


def test_under_vmap_scan_and_checkpoint(tile):
    tile((8, 8))
    q, k, v = _qkv(3, 1, 20, 2, 4)

    def grads(impl, batched):
        grad = jax.grad(_loss(_attend(impl)), (0, 1, 2))
        if batched == "loop":
            return [jnp.stack(g) for g in zip(*(grad(*a) for a in zip(q, k, v)))]
        if batched == "vmap":
            return jax.jit(jax.vmap(grad))(q, k, v)

        def total(q, k, v):
            body = jax.checkpoint(lambda c, a: (c + _loss(_attend(impl))(*a), None))
            return jax.lax.scan(body, 0.0, (q, k, v))[0]

        return jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)

    expected = grads("reference", "loop")
    for batched in ("vmap", "scan"):
        for found, oracle in zip(grads("xla", batched), expected):
            close(found, oracle, kind="gradient", name=batched)


@pytest.mark.parametrize("tiles", [(8, 8), (64, 64)])
def test_checkpoint_names_save_the_forward(tiles, tile):
    """With both saved, the backward repeats none of the forward's two matmuls."""
    tile(tiles)
    qkv = _qkv(1, 20, 2, 4)
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names("attention_out", "attention_lse")

    def dots(wrap):
        loss = wrap(lambda q, k, v: (attention(q, k, v, impl="xla") ** 2).sum())
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*qkv)
        return lowered.as_text().count("dot_general")

    plain = dots(lambda f: f)
    assert plain == 7
    assert dots(lambda f: jax.checkpoint(f, policy=policies.nothing_saveable)) == plain + 2
    assert dots(lambda f: jax.checkpoint(f, policy=named)) == plain


def test_tile_sizes():
    for T in (1, 16, 511, 512, 513, 1000, 32768):
        tile_q, tile_k = xla.tile_sizes(1, 1, T, 700)
        assert tile_q <= 512 and tile_k == 352
        assert -(-T // tile_q) * tile_q - T < 16 * -(-T // tile_q)
    tile_q, tile_k = xla.tile_sizes(64, 32, 4096, 4096)
    assert 4 * 64 * 32 * tile_q * tile_k <= xla.TILE_BYTES
    assert xla.tile_sizes(8, 8, 256, 256) == (256, 256)
