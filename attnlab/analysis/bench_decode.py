"""The decoding case of ``attnlab bench attention``: one query a row over a paged cache.

The pages stand in random order in their pool.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis.bench_cases import Decode
from attnlab.ops.attention.decode import decode

ROWS = 4  # rows of the batch that are compared with dense attention


def arrays(case: Decode) -> dict[str, jax.Array]:
    """``q[B, 1, N, H]``, pages ``k[P, page, K, H]`` and ``v[P, page, K, V]``, ``pages[B, S/page]``
    (the page of every piece of a row) and ``lengths[B]``; made on the device."""
    each = case.S // case.page
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (case.B * each, case.page, case.K)
    order = jax.random.permutation(keys[3], case.B * each).astype(jnp.int32)
    return {
        "q": jax.random.normal(keys[0], (case.B, 1, case.N, case.H), jnp.bfloat16),
        "k": jax.random.normal(keys[1], (*shape, case.H), jnp.bfloat16),
        "v": jax.random.normal(keys[2], (*shape, case.V), jnp.bfloat16),
        "pages": order.reshape(case.B, each),
        "lengths": jnp.full((case.B,), case.S, jnp.int32),
    }


def reference(case: Decode, data: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Exact ``o[rows, 1, N, V]`` of the first rows, in fp32."""

    def one(q, pages):
        k, v = (data[n][pages].reshape(case.S, case.K, -1).astype(jnp.float32) for n in "kv")
        q = q.astype(jnp.float32).reshape(case.K, -1, case.H)
        p = jax.nn.softmax(jnp.einsum("kgh,skh->kgs", q, k) / case.H**0.5, axis=-1)
        return jnp.einsum("kgs,skv->kgv", p, v).reshape(1, case.N, -1)

    with jax.default_matmul_precision("highest"):
        rows = [one(data["q"][b, 0], data["pages"][b]) for b in range(min(ROWS, case.B))]
    return {"o": np.asarray(jnp.stack(rows)), "tokens": np.zeros(1, int)}


def call(case: Decode, impl: str, data: dict[str, jax.Array]):
    """``(function, args)`` of one decoding step; results by name.

    Raises:
        ImplementationError: ``impl`` refuses the case, or has no decoding (a vendor's name).
    """

    def step(q, k, v, pages, lengths):
        return {"o": decode(q, k, v, pages=pages, lengths=lengths, impl=impl)}

    return jax.jit(step), [data[n] for n in ("q", "k", "v", "pages", "lengths")]
