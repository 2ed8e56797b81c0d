"""Calls of ``attention_rows`` and what they must give: all pairs at once, and row by row."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flex_cases import bucket

from attnlab.core.mask import Causal, MaskMod, Prefix, Window
from attnlab.testing.budget import close

B, K, R, S, H, V, N = 2, 2, 21, 30, 8, 4, 6
G = N // K
PARAMETERS = {
    "q": (B, K, R, H), "k": (B, S, K, H), "v": (B, S, K, V), "sinks": (N,), "slope": (N,),
    "row": (B, N, R), "column": (B, S), "shared": (32,), "table": (N, 32), "bias": (N, S),
}


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


def compare(found: dict, expected: dict, dtype: str = "float32") -> None:
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        close(x, y, dtype=dtype, kind="gradient" if "'d'" in name else "op", name=name)
