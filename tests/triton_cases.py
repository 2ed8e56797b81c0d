"""Cases of the Triton kernels, for the interpreter and for devices: arrays, masks and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.mask import Causal, Coords, Full, Prefix, Segments, SinkTokens, Window
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import plan, reference
from attnlab.testing.budget import error


def packed(T: int, rows: tuple[tuple[int, ...], ...]):
    """Positions and segments of rows of documents of these lengths, end to end, then padding."""
    places, segments = [], []
    for lengths in rows:
        each = (*lengths, T - sum(lengths))
        places.append(np.concatenate([np.arange(n) for n in each]))
        segments.append(np.repeat([*range(1, len(each)), 0], each))
    return np.stack(places), np.stack(segments)


# B, T, S, N, K, H, V
CASES = {
    "causal": dict(shape=(1, 64, 64, 2, 2, 16, 16)),
    "gqa, uneven, padded widths, 2 rows": dict(shape=(2, 75, 75, 4, 2, 24, 40)),
    "full, sink, cap": dict(shape=(1, 50, 50, 2, 1, 16, 16), mask=Full(), sink=True, cap=2.0),
    "window 1": dict(shape=(1, 50, 50, 1, 1, 16, 16), mask=Causal() & Window(1)),
    "window, sink tokens": dict(
        shape=(1, 90, 90, 2, 1, 16, 16), mask=Causal() & (Window(20) | SinkTokens(3)), sink=True,
    ),
    "window on both sides": dict(shape=(1, 90, 90, 1, 1, 16, 16), mask=Window(9, 14)),
    "prefix a row": dict(
        shape=(2, 70, 70, 1, 1, 16, 16), mask=Causal() | Prefix(np.asarray([5, 40], np.int32)),
    ),
    "packed, 2 rows": dict(
        shape=(2, 100, 100, 2, 2, 16, 16), lengths=((20, 5, 30, 38), (97,)), mask=Causal(),
    ),
    "packed, window, sink tokens, cap": dict(
        shape=(1, 100, 100, 2, 1, 16, 16), lengths=((60, 3, 30),), cap=3.0,
        mask=Causal() & Window(16) | SinkTokens(2),
    ),
    "any positions, T over S": dict(shape=(2, 70, 45, 2, 1, 16, 16), mask=Causal(), shuffled=True),
    "any, segments, S over T": dict(
        shape=(2, 40, 90, 2, 1, 16, 16), mask=Causal() & Window(30), shuffled=True, segments=True,
        sink=True,
    ),
    "no key at all": dict(shape=(1, 40, 40, 1, 1, 16, 16), mask=Prefix(0)),
    "negative scale": dict(shape=(1, 40, 40, 1, 1, 16, 16), scale=-0.3, mask=Causal()),
    "scale 0": dict(shape=(1, 40, 40, 1, 1, 16, 16), scale=0.0, mask=Causal()),
    "wide": dict(shape=(1, 40, 40, 1, 1, 192, 128)),
    "bfloat16": dict(
        shape=(1, 75, 75, 4, 2, 24, 16), dtype="bfloat16", mask=Causal() & Window(40), sink=True,
        cap=2.0,
    ),
    "planned": dict(shape=(1, 64, 64, 2, 2, 16, 16), planned=True),
}


def arguments(case):
    """Arrays, their cotangents and the keywords of ``forward``."""
    B, T, S, N, K, H, V = case["shape"]
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V), (B, T, N, V), (B, T, N), (N,)
    q, k, v, do, dlse, sink = (rng.normal(size=s).astype(np.float32) for s in shapes)
    mask, layout, segments = case.get("mask", Causal()), "full", (None, None)
    sides = [np.tile(np.arange(n), (B, 1)) for n in (T, S)]
    if "lengths" in case:
        places, ids = packed(T, case["lengths"])
        sides, segments, layout = [places] * 2, (ids,) * 2, "packed"
    if case.get("shuffled"):
        sides = [rng.integers(0, max(T, S), size=(B, n)) for n in (T, S)]
        layout = "any"
    if case.get("segments"):
        segments = [np.sort(rng.integers(0, 4, size=(B, n)), 1) for n in (T, S)]
    mask = mask if segments[0] is None else mask & Segments()
    if case.get("planned"):
        mask = plan(mask, batch=B, heads=N, length=T, block_q=32, block_k=16)
    coords = [
        Coords(
            jnp.asarray(p, jnp.int32), None if s is None else jnp.asarray(s, jnp.int32),
            jnp.arange(p.shape[1], dtype=jnp.int32),
        )
        for p, s in zip(sides, segments)
    ]
    keywords = dict(
        mask=mask.bound(B, N), score=None, q_coords=coords[0], k_coords=coords[1],
        scale=case.get("scale", H**-0.5), logit_cap=case.get("cap"), return_lse=True, layout=layout,
    )
    return (q, k, v, sink if case.get("sink") else None), (do, dlse), keywords


def run(forward, case, dtype, softmax_dtype):
    """``(o, lse, dq, dk, dv, dsink)``, with cotangents on o and lse."""
    primals, (do, dlse), keywords = arguments(case)
    *qkv, sink = primals
    given = case.get("dtype", "float16")  # what all of them are rounded to
    qkv = [jnp.asarray(x, given).astype(dtype) for x in qkv]
    sink = None if sink is None else jnp.asarray(sink, softmax_dtype)

    def loss(q, k, v, sink):
        o, lse = forward(
            q, k, v, sink_logits=sink, softmax_dtype=jnp.dtype(softmax_dtype), **keywords
        )
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o.astype(softmax_dtype) * do).sum() + (seen * dlse).sum(), (o, lse)

    by = (0, 1, 2) if sink is None else (0, 1, 2, 3)
    (_, outs), grads = jax.jit(jax.value_and_grad(loss, by, has_aux=True))(*qkv, sink)
    return dict(zip(("o", "lse", "dq", "dk", "dv", "dsink"), map(np.asarray, (*outs, *grads))))


def errors(forward, case) -> dict[str, tuple[float, float, float]]:
    """Result -> (error, error of the reference in the same dtype, size), largest magnitudes."""
    dtype = case.get("dtype", "float16")
    ours = run(forward, case, dtype, "float32")
    rough = run(reference.forward, case, dtype, "float32")
    with enable_x64():
        exact = run(reference.forward, case, "float64", "float64")
    return {
        what: (error(ours[what], x), error(rough[what], x),
               float(np.abs(x[np.isfinite(x)]).max(initial=0)))
        for what, x in exact.items()
    }


def judge(name: str, case, found: dict[str, tuple[float, float, float]]) -> None:
    """Assert that a case is at most twice as wrong as the reference, plus a rounding band."""
    eps = float(jnp.finfo(case.get("dtype", "float16")).eps)
    for what, (wrong, own, size) in found.items():
        allowed = 2 * own + 4 * eps * size
        assert wrong <= allowed, f"{name}: {what} is off by {wrong:.2e}, allowed {allowed:.2e}"
    assert name == "no key at all" or all(found[what][2] > 0 for what in ("o", "dv"))
