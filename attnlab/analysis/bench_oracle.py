"""The numbers every timed implementation is first compared with: dense attention in fp32.

It shares no code with the op: masks and score changes are written out again from their definition.
Query rows are taken a few hundred at a time, so the full length is compared and not a small copy.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnlab.analysis import bench_cases as cases
from attnlab.analysis.bench_cases import Case

# Largest error, relative to the norm of the exact array, that is still timed: bf16 operands round
# to 2 to 5e-3. ROW: of one token and head of o, where a wrong mask shows that a norm would hide.
LIMITS = {"o": 1e-2, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2, "dtable": 2e-2}
ROW = 5e-2
CHUNK_BYTES = 2**28  # fp32 logits of the query rows taken together


def reference(case: Case, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Exact ``o`` (and ``dq, dk, dv, dtable``) at the sampled tokens, with ``tokens``."""
    chunk = case.S
    while chunk > 16 and case.B * case.N * chunk * case.S * 4 > CHUNK_BYTES:
        chunk //= 2
    extras = {name: jnp.asarray(x) for name, x in data.items() if name in ("slopes", "table")}
    if "segments" in data:
        extras["segments"] = jnp.asarray(data["segments"])
    if "lists" in data:
        extras["blocks"] = jnp.asarray(_dense_blocks(case, data["lists"]))
    wide = [jnp.asarray(data[name]).astype(jnp.float32) for name in ("q", "k", "v", "do")]
    with jax.default_matmul_precision("highest"):
        exact = _run(case, chunk, *wide, extras)
    tokens = cases.sample(case.S)
    found = {"tokens": tokens}
    for name, x in exact.items():
        found[name] = np.asarray(x if name == "dtable" else x[:, tokens])
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(case: Case, chunk: int, q, k, v, do, extras) -> dict[str, jax.Array]:
    table = extras.get("table", jnp.zeros(()))

    def whole(q, k, v, table):
        rows = q.reshape(case.B, -1, chunk, case.N, case.H).swapaxes(0, 1)
        first = jnp.arange(rows.shape[0]) * chunk
        part = jax.checkpoint(
            lambda q, first: _rows(case, q, first, k, v, extras | {"table": table})
        )
        o = lax.map(lambda args: part(*args), (rows, first))
        return o.swapaxes(0, 1).reshape(case.B, case.S, case.N, case.V)

    if not case.backward:
        return {"o": whole(q, k, v, table)}
    o, pull = jax.vjp(whole, q, k, v, table)
    found = dict(zip(("dq", "dk", "dv", "dtable"), pull(do), strict=True))
    if case.mod != "t5":
        del found["dtable"]
    return {"o": o} | found


def _rows(case: Case, q, first, k, v, extras):
    """``o`` of the query rows ``q[B, chunk, N, H]`` that start at token ``first``."""
    B, chunk, N, H = q.shape
    t, s = first + jnp.arange(chunk)[:, None], jnp.arange(case.S)[None]
    grouped = q.reshape(B, chunk, case.K, -1, H)
    z = jnp.einsum("btkgh,bskh->bkgts", grouped, k).reshape(B, N, chunk, -1) / H**0.5
    if case.mod == "cap":
        z = cases.CAP * jnp.tanh(z / cases.CAP)
    elif case.mod == "alibi":
        z += extras["slopes"][:, None, None] * (s - t)
    elif case.mod == "t5":
        # As a product with the one-hot buckets: the transpose of a gather is slow and unordered.
        of_distance = jnp.asarray(cases.bucket_of(np.arange(case.S)))
        bucket = of_distance[jnp.maximum(t - s, 0)]
        z += jnp.einsum("nc,tsc->nts", extras["table"], jax.nn.one_hot(bucket, cases.BUCKETS))
    z = jnp.where(_seen(case, t, s, extras), z, -jnp.inf)
    p = jax.nn.softmax(z, axis=-1).reshape(B, case.K, -1, chunk, case.S)
    return jnp.einsum("bkgts,bskv->btkgv", p, v).reshape(B, chunk, N, -1)


def _seen(case: Case, t, s, extras) -> jax.Array:
    """Visible pairs, ``[chunk, S]`` or ``[N, chunk, S]``; every row sees at least itself."""
    causal = s <= t
    if case.sight == "documents":
        segments = extras["segments"]
        return causal & (segments[t] == segments[s])
    if case.sight == "window":
        return causal & ((t - s < case.window) | (s < cases.SINKS))
    if case.sight == "blocks":
        return causal & extras["blocks"][:, t // case.block, s // case.block]
    return causal


def _dense_blocks(case: Case, lists: np.ndarray) -> np.ndarray:
    """Bool ``[N, S/block, S/block]`` of the block lists."""
    side = case.S // case.block
    dense = np.zeros((case.N, side, side), bool)
    head, row, slot = np.nonzero(lists[0] >= 0)
    dense[head, row, lists[0][head, row, slot]] = True
    return dense


def compare(found: dict[str, Any], exact: dict[str, Any]) -> tuple[dict[str, float], str | None]:
    """Errors of ``found`` against ``exact`` by name, and why it is not timed (None: it agrees).

    Both hold arrays ``[B, tokens, heads, width]`` (``dtable``: ``[N, 32]``). An error is the norm
    of the difference over the norm of the exact array; ``o_row`` is the largest one of any token
    and head of ``o``.
    """
    errors, wrong = {}, []
    for name, x in found.items():
        a, b = (np.asarray(y).astype(np.float32).astype(np.float64) for y in (x, exact[name]))
        if a.shape != b.shape:
            wrong.append(f"{name} has shape {a.shape}, not {b.shape}")
            continue
        measured = {name: (np.linalg.norm(a - b) / np.linalg.norm(b), LIMITS[name])}
        if name == "o":
            rows = np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)
            measured["o_row"] = rows.max(), ROW
        for label, (error, limit) in measured.items():
            errors[label] = float(error)
            if not error <= limit:
                wrong.append(f"{label} {error:.1e} above {limit:.0e}")
    return errors, "disagrees with the reference: " + ", ".join(wrong) if wrong else None
