"""Fused attention on a real GPU, forward and gradients, against the dense reference in fp32.

    pytest -n 0 tests/gpu

An implementation may be at most twice as wrong as the reference run in bf16, plus a rounding band.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import Blocks, Causal, Full, SinkTokens, Window, attention
from attnlab.core.dispatch import Device
from attnlab.core.errors import ImplementationError
from attnlab.ops.attention import tuning
from attnlab.ops.attention.carry import attention_step, finish

ON_GPU = Device.default().platform == "gpu"
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU; CI has none")

CASES = {
    "causal": dict(mask=Causal()),
    "window": dict(mask=Causal() & Window(100)),
    "window 1": dict(mask=Causal() & Window(1)),
    "scale": dict(mask=Causal(), scale=0.3),
    "cap": dict(mask=Causal(), logit_cap=5.0),
    "packed": dict(mask=Causal(), packed=True),
    "packed window": dict(mask=Causal() & Window(100), packed=True),
    "window, sink tokens": dict(mask=Causal() & (Window(100) | SinkTokens(4))),
    "blocks": dict(blocks=True),
    "slopes": dict(mask=Causal(), mod=lambda e: lambda s, n, q, k: s + e["slope"][n] * (k - q)),
    "T5": dict(mask=Causal(), mod=lambda e: lambda s, n, q, k: s + e["table"][n, bucket(q - k)]),
    "values": dict(
        mask=Causal(), mod=lambda e: lambda s, n, q, k, *, batch, q_index, k_index: (
            s * e["row"][batch, q_index] + e["column"][n, k_index]
        ),
    ),
    "bias by query and key": dict(
        mask=Causal() & Window(300), mod=lambda e: lambda s, n, q, k, *, batch, q_index, k_index: (
            s + e["bias"][n, q_index, k_index] + e["shared"][q_index, k_index]
        ),
    ),
    "table": dict(mask=lambda n, q, k: TABLE[q, k] & (q >= k)),
}
TABLE = jax.random.bernoulli(jax.random.key(9), 0.3, (1024, 1024)) | jnp.eye(1024, dtype=bool)
SHAPES = {  # B, T, N, K, H, V
    "GQA 128": (2, 1024, 8, 2, 128, 128),
    "MHA 64": (2, 512, 4, 4, 64, 64),
    "MQA 128, odd length": (1, 777, 4, 1, 128, 128),
    "MLA 192/128": (1, 512, 4, 4, 192, 128),
    "256": (1, 512, 2, 1, 256, 256),
}


def bucket(distance):
    """The 32 one-sided buckets of T5."""
    d = jnp.maximum(distance, 0)
    far = 16 + (jnp.log(d.astype(jnp.float32) / 16) / jnp.log(8.0) * 16).astype(jnp.int32)
    return jnp.where(d < 16, d, jnp.minimum(far, 31))


def packed(B: int, T: int):
    cuts = [0, 1, T // 3, T // 3 + 5, 3 * T // 4, T - 7]
    segments = np.searchsorted(cuts, np.arange(T), side="right")
    starts = np.asarray(cuts)[segments - 1]
    positions = np.arange(T) - starts
    segments = np.where(np.arange(T) >= T - 7, 0, segments)
    positions = np.where(segments > 0, positions, 0)
    return jnp.tile(positions.astype(np.int32), (B, 1)), jnp.tile(segments.astype(np.int32), (B, 1))


@pytest.mark.parametrize("impl", ["gpu", "cudnn", "tokamax", "triton", "xla"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(impl, shape, case):
    B, T, N, K, H, V = SHAPES[shape]
    options = dict(CASES[case])
    if options.pop("packed", False):
        positions, segments = packed(B, T)
        options |= dict(positions=positions, segments=segments, layout="packed")
    keys = jax.random.split(jax.random.key(0), 4)
    if options.pop("blocks", False):
        tiles = -(-T // 128)
        lists = jax.random.randint(jax.random.key(7), (B, N, tiles, 3), -1, tiles)
        options["mask"] = Causal() & Blocks(lists, 128, 128)
    make = options.pop("mod", None)
    draws = jax.random.split(jax.random.key(3), 6)
    extra = {
        "slope": 0.1 * jax.random.normal(draws[0], (N,)),
        "table": jax.random.normal(draws[1], (N, 32)),
        "row": jax.random.normal(draws[2], (B, T)), "column": jax.random.normal(draws[3], (N, T)),
        "bias": jax.random.normal(draws[4], (N, T, T)),
        "shared": jax.random.normal(draws[5], (T, T)),
    }
    sizes = ((N, H), (K, H), (K, V), (N, V))
    q, k, v, do = (jax.random.normal(key, (B, T, *s)) for key, s in zip(keys, sizes))

    def run(name, dtype):
        args = [a.astype(dtype) for a in (q, k, v)]

        def loss(q, k, v, extra):
            mod = {} if make is None else {"score_mod": make(extra)}
            out = attention(q, k, v, impl=name, **options, **mod)
            return (out.astype(jnp.float32) * do).sum(), out

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
        (_, out), grads = step(*args, extra if make else {})
        return [np.asarray(a, np.float64) for a in jax.tree.leaves((out, *grads))]

    try:
        fast = run(impl, jnp.bfloat16)
    except ImplementationError as refusal:
        pytest.skip(reason=f"refused: {refusal.rule}")
    with jax.default_matmul_precision("highest"):
        exact = run("reference", jnp.float32)
    rough = run("reference", jnp.bfloat16)
    names = ("o", "dq", "dk", "dv", *(sorted(extra) if make else ()))
    for name, a, b, c in zip(names, fast, exact, rough, strict=True):
        norm = np.linalg.norm(b) or np.sqrt(b.size)  # a window of 1 has no gradient in q and k
        error, allowed = np.linalg.norm(a - b) / norm, np.linalg.norm(c - b) / norm
        assert error <= 2 * allowed + 4e-3, f"{name}: {error:.2e}, reference {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ring_is_one_call(shape):
    """Parts of unequal length in any order, gradients through the carry; the result twice alike."""
    B, T, N, K, H, V = SHAPES[shape]
    keys = jax.random.split(jax.random.key(1), 5)
    sizes = ((N, H), (K, H), (K, V), (N, V))
    q, k, v, do = (jax.random.normal(key, (B, T, *s)) for key, s in zip(keys, sizes))
    slope = 0.05 * jax.random.normal(keys[4], (N,))
    places = jnp.broadcast_to(jnp.arange(T), (B, T))
    parts = [slice(0, T // 3), slice(3 * T // 4, T), slice(T // 3, 3 * T // 4)]

    def ring(q, k, v, slope, impl):
        carry = None
        for part in parts:
            carry = attention_step(
                carry, q, k[:, part], v[:, part], positions=(places, places[:, part]), impl=impl,
                score_mod=lambda s, n, q, k: s + slope[n] * (k - q),
            )
        return finish(carry, dtype=v.dtype)[0]  # type: ignore[arg-type] - parts is not empty

    def run(impl, dtype):
        args = [x.astype(dtype) for x in (q, k, v)]

        def loss(q, k, v, slope):
            out = ring(q, k, v, slope, impl)
            return (out.astype(jnp.float32) * do).sum(), out

        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
        (_, out), grads = step(*args, slope)
        return [np.asarray(a, np.float64) for a in (out, *grads)]

    try:
        fast = run("gpu", jnp.bfloat16)
    except ImplementationError as refusal:
        pytest.skip(reason=f"refused: {refusal.rule}")
    for a, b in zip(fast, run("gpu", jnp.bfloat16), strict=True):
        assert (a == b).all(), "two runs differ"
    with jax.default_matmul_precision("highest"):
        exact = run("xla", jnp.float32)
    rough = run("xla", jnp.bfloat16)
    for name, a, b, c in zip(("o", "dq", "dk", "dv", "slope"), fast, exact, rough, strict=True):
        error, allowed = (np.linalg.norm(x - b) / np.linalg.norm(b) for x in (a, c))
        assert error <= 2 * allowed + 4e-3, f"{name}: {error:.2e}, xla {allowed:.2e}"


@pytest.mark.parametrize("shape", ["GQA 128", "MHA 64", "MLA 192/128", "256"])
@pytest.mark.parametrize("case", ["causal", "packed window", "slopes", "bias by query and key"])
def test_persistent_blocks_change_nothing(case, shape):
    """Blocks that take rows from a counter give the bits of a block a row, every time."""
    _, _, N, K, H, V = SHAPES[shape]
    B, T = 2, 2048
    B *= -(-512 // (B * K * T // 128))  # more rows of tiles than multiprocessors, each kernel
    options = dict(CASES[case])
    if options.pop("packed", False):
        positions, segments = packed(B, T)
        options |= dict(positions=positions, segments=segments, layout="packed")
    make = options.pop("mod", None)
    extra = {"slope": 0.1 * jnp.arange(1.0, N + 1)}
    if "bias" in case:
        extra["bias"] = jax.random.normal(jax.random.key(5), (N, T, T))
        extra["shared"] = extra["bias"][0]
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = ((N, H), (K, H), (K, V), (N, V))
    args = [
        jax.random.normal(key, (B, T, *s), jnp.bfloat16) for key, s in zip(keys, sizes)
    ]

    def loss(q, k, v, do):
        mod = {} if make is None else {"score_mod": make(extra)}
        out = attention(q, k, v, impl="gpu", **options, **mod)
        return (out * do).astype(jnp.float32).sum(), out

    def runs(forced, times):
        try:
            with tuning.forcing(forced):
                lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(*args)
            step = lowered.compile()
        except ImplementationError as refusal:
            pytest.skip(reason=f"refused: {refusal.rule}")
        return [[np.asarray(x) for x in jax.tree.leaves(step(*args))] for _ in range(times)]

    room = 2 if max(H, V) <= 128 else 1
    names = ["persistent", "persistent_dq", "persistent_dkv"]
    rings = {"block_k_dq": 64, "stages_dq": 2, "block_q_dkv": 64, "stages_dkv": 2}
    if shape == "256":  # its kernel for dk and dv has no persistent blocks
        names, rings = names[:2], {}
    elif room == 1:
        rings |= {"wide_dkv": 0}
    usual = runs({name: 0 for name in names} | rings, 1)[0]
    for found in runs({name: room for name in names} | rings, 5):
        for a, b in zip(found, usual, strict=True):
            assert (a == b).all()


FUSED = {"fused_dkv": 1, "block_q_dkv": 64, "stages_dkv": 2, "turns_dkv": 0}


@pytest.mark.parametrize("mask", [Causal(), Full()], ids=["causal", "full"])
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("B, T, N, K", [(1, 777, 4, 1), (2, 2048, 16, 4), (1, 8192, 24, 24)])
def test_the_fused_backward_is_one_sum_in_one_order(B, T, N, K, H, mask):
    """More rows of keys than multiprocessors wait for each other, and every run has the same bits.
    Beside two kernels its error is that of their rounding."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (
        jax.random.normal(key, (B, T, n, H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N))
    )

    def loss(q, k, v):
        return (attention(q, k, v, mask=mask, impl="gpu") * do).astype(jnp.float32).sum()

    def step(forced):
        try:
            with tuning.forcing(forced):
                return jax.jit(lambda *x: jax.grad(loss, (0, 1, 2))(*x)).lower(q, k, v).compile()
        except ImplementationError as refusal:
            pytest.skip(reason=f"refused: {refusal.rule}")

    fused = step(FUSED)
    found = [[np.asarray(x, np.float32) for x in fused(q, k, v)] for _ in range(20)]
    for again in found[1:]:
        for a, b in zip(again, found[0], strict=True):
            assert (a == b).all()
    two = step({"fused_dkv": 0})(q, k, v)
    for name, a, b in zip(("dq", "dk", "dv"), found[0], two, strict=True):
        b = np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 6e-3 * np.linalg.norm(b), name


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(200)], ids=["causal", "window"])
def test_vmap_is_a_loop(mask):
    """Fused and persistent kernels count in device memory; rows of vmap share no counts."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, do = (
        jax.random.normal(key, (3, 1, 1500, n, 128), jnp.bfloat16)
        for key, n in zip(keys, (16, 4, 4, 16))
    )

    def step(q, k, v, do):
        out, pull = jax.vjp(lambda *x: attention(*x, mask=mask, impl="gpu"), q, k, v)
        return out, *pull(do)

    found = jax.jit(jax.vmap(step))(q, k, v, do)
    alone = [jax.jit(step)(*x) for x in zip(q, k, v, do)]
    for a, b in zip(found, zip(*alone, strict=True), strict=True):
        assert (np.asarray(a) == np.stack([np.asarray(x) for x in b])).all()
