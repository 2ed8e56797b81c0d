"""The decode kernel on a real GPU against the dense reference in fp32, and that it repeats itself.

    pytest -n 0 tests/gpu

It may be at most twice as wrong as the reference run in bf16, plus a rounding band.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.core.dispatch import Device
from attnlab.core.errors import ImplementationError
from attnlab.ops.attention.decode import decode

ON_GPU = Device.default().platform == "gpu"
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a GPU; CI has none")

S, LENGTHS = 1024, (1024, 0, 7, 513, 640)
CASES = {  # sizes and options
    "page 128": {},
    "page 16": dict(page=16),
    "page 64": dict(page=64),
    "page 256": dict(page=256),
    "contiguous": dict(page=None),
    "positions and segments": dict(places=True),
    "eight tokens": dict(t=8),
    "two tiles of rows": dict(t=8, N=128),
    "MHA": dict(N=8),
    "MQA": dict(K=1),
    "64": dict(H=64, V=64),
    "192 over 128": dict(H=192),
    "256": dict(H=256, V=256),
    "window and sinks": dict(window=100, sink_tokens=5, t=3),
    "window of documents": dict(window=100, sink_tokens=5, t=3, places=True),
    "cap, sink logits, scale": dict(logit_cap=5.0, sinks=True, scale=-0.1),
}


@pytest.mark.parametrize("splits", [None, 7])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name, splits):
    options = {"t": 1, "N": 32, "K": 8, "H": 128, "V": 128, "page": 128} | CASES[name]
    t, N, K, H, V, page = (options.pop(n) for n in ("t", "N", "K", "H", "V", "page"))
    B, lengths = len(LENGTHS), jnp.array(LENGTHS)
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (B, S, K) if page is None else (B * S // page, page, K)
    q, k, v = (
        jax.random.normal(key, s)
        for key, s in zip(keys, ((B, t, N, H), (*shape, H), (*shape, V)))
    )
    if page is not None:
        options["pages"] = jax.random.permutation(keys[3], B * S // page).reshape(B, -1)
    if options.pop("sinks", False):
        options["sink_logits"] = jax.random.normal(keys[4], (N,))
    if options.pop("places", False):
        slots = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        last = jnp.maximum(lengths[:, None] - t + jnp.arange(t), 0)
        options["positions"] = (last % 300, slots % 300)
        options["segments"] = (last // 300 + 1, slots // 300 + 1)

    def run(impl, dtype, **more):
        args = [x.astype(dtype) for x in (q, k, v)]
        call = functools.partial(
            decode, lengths=lengths, impl=impl, return_lse=True, **options, **more
        )
        return [np.asarray(x, np.float64) for x in jax.jit(call)(*args)]

    try:
        fast = run("gpu", jnp.bfloat16, splits=splits)
    except ImplementationError as refusal:
        pytest.skip(reason=f"refused: {refusal.rule}")
    again = run("gpu", jnp.bfloat16, splits=splits)
    with jax.default_matmul_precision("highest"):
        exact = run("reference", jnp.float32)
    rough = run("reference", jnp.bfloat16)
    assert np.array_equal(np.isneginf(fast[1]), np.isneginf(exact[1]))
    assert (fast[0][np.isneginf(exact[1])] == 0).all()
    for what, a, b, e, r in zip(("o", "lse"), fast, again, exact, rough, strict=True):
        assert np.array_equal(a, b), f"{what} differs from run to run"
        a, e, r = (np.where(np.isneginf(x), 0, x) for x in (a, e, r))
        error, allowed = (np.linalg.norm(x - e) / np.linalg.norm(e) for x in (a, r))
        assert error <= 2 * allowed + 4e-3, f"{what}: {error:.2e}, reference {allowed:.2e}"
