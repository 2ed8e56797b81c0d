"""Score and mask functions written twice: of one pair, and dense in float64 without attnlab's help.

``MODS[name]`` has the arrays it captures (by shape), the function of a pair that closes over them,
and the same on whole arrays: ``dense(a, z, c)`` of logits ``z[B, N, T, S]`` and coordinates ``c``
that broadcast to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core.mask import (
    And,
    Blocks,
    Causal,
    Full,
    Mask,
    MaskMod,
    Or,
    Prefix,
    Segments,
    SinkTokens,
    Window,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    V: int
    tiles: tuple[int, int]


SHAPES = {
    "gqa": Shape(2, 37, 37, 4, 2, 8, 8, (16, 16)),
    "cross": Shape(2, 21, 40, 3, 1, 4, 6, (8, 16)),
    "one_tile": Shape(2, 12, 12, 2, 2, 8, 4, (64, 64)),
}


@dataclasses.dataclass(frozen=True)
class Dense:
    """Coordinates that broadcast to ``[B, N, T, S]``."""

    batch: Any
    head: Any
    q_pos: Any
    k_pos: Any
    q_index: Any
    k_index: Any
    q_segment: Any
    k_segment: Any


def coordinates(s: Shape, where: dict) -> Dense:
    def both(x):
        q, k = x if isinstance(x, tuple) else (x, x)
        return jnp.asarray(q)[:, None, :, None], jnp.asarray(k)[:, None, None, :]

    if "segments" not in where:
        where = where | {"segments": tuple(jnp.ones((s.B, n), jnp.int32) for n in (s.T, s.S))}
    rows, heads = np.arange(s.B)[:, None, None, None], np.arange(s.N)[:, None, None]
    index = np.arange(s.T)[:, None], np.arange(s.S)
    return Dense(rows, heads, *both(where["positions"]), *index, *both(where["segments"]))


def bucket(d):
    """The 32 one-sided buckets of T5 up to a distance of 64."""
    d = jnp.maximum(d, 0)
    far = 16 + (jnp.log(jnp.maximum(d, 1) / 16) / jnp.log(4.0) * 16).astype(jnp.int32)
    return jnp.where(d < 16, d, jnp.minimum(far, 31))


@dataclasses.dataclass(frozen=True)
class Mod:
    arrays: dict[str, str]  # name to axes, of "BNTS" and digits; "D" is T + S - 1
    pair: Callable[[dict], Callable] | None
    dense: Callable[[dict, Any, Dense], Any]
    scale: float = 1.0

    def draw(self, s: Shape, seed: int = 2) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        sizes = dataclasses.asdict(s) | {"D": s.T + s.S - 1, "3": 32}
        return {
            name: self.scale * rng.standard_normal([sizes[a] for a in axes])
            for name, axes in self.arrays.items()
        }


GROUPS = np.array([1, 0, 1, 0, 2], np.int32)


def _several(a):
    def mod(s, head, q, k, *, batch, q_segment, k_index):
        s = a["temperature"] * s + a["key"][batch, k_index]
        return s + jnp.where(q_segment == 2, a["table"][bucket(q - k), head], a["slope"][head] * q)

    return mod


def _forget(a):
    def mod(s, head, q, k, *, batch, q_index, k_index):
        return s + a["q"][batch, head, q_index] - a["k"][batch, head, k_index]

    return mod


def _weights(w):
    return jnp.where(w > 0, jnp.log(jnp.where(w > 0, w, 1)), -jnp.inf)


MODS = {
    "identity": Mod({}, lambda a: lambda s, h, q, k: s, lambda a, z, c: z),
    "alibi": Mod(
        {"slope": "N"}, lambda a: lambda s, h, q, k: s - a["slope"][h] * (q - k),
        lambda a, z, c: z - a["slope"][:, None, None] * (c.q_pos - c.k_pos), 0.1,
    ),
    "cap": Mod(
        {"cap": "N"},
        lambda a: lambda s, h, q, k: (1 + a["cap"][h] ** 2) * jnp.tanh(s / (1 + a["cap"][h] ** 2)),
        lambda a, z, c: (
            (1 + a["cap"][:, None, None] ** 2) * jnp.tanh(z / (1 + a["cap"][:, None, None] ** 2))
        ),
    ),
    "key_bias": Mod(
        {"bias": "NS"}, lambda a: lambda s, h, q, k, *, k_index: s + a["bias"][h, k_index],
        lambda a, z, c: z + a["bias"][:, None],
    ),
    "forget": Mod(
        {"q": "BNT", "k": "BNS"}, _forget,
        lambda a, z, c: z + a["q"][..., :, None] - a["k"][..., None, :],
    ),
    "t5": Mod(
        {"table": "3N"}, lambda a: lambda s, h, q, k: s + a["table"][bucket(q - k), h],
        lambda a, z, c: z + jnp.moveaxis(a["table"][bucket(c.q_pos - c.k_pos)], -1, 2)[:, 0],
    ),
    "toeplitz": Mod(
        {"table": "ND"},
        lambda a: lambda s, h, q, k, *, q_index, k_index: (
            s + a["table"][h, q_index - k_index + a["table"].shape[1] // 2]
        ),
        lambda a, z, c: z + a["table"][:, c.q_index - c.k_index + a["table"].shape[1] // 2],
    ),
    "dense_heads": Mod(
        {"bias": "NTS"},
        lambda a: lambda s, h, q, k, *, q_index, k_index: s + a["bias"][h, q_index, k_index],
        lambda a, z, c: z + a["bias"],
    ),
    "dense_rows": Mod(
        {"bias": "BNTS"},
        lambda a: lambda s, h, q, k, *, batch, q_index, k_index: (
            s + a["bias"][batch, h, q_index, k_index]
        ),
        lambda a, z, c: z + a["bias"],
    ),
    "scalar": Mod(
        {"t": ""}, lambda a: lambda s, h, q, k: s * jnp.exp(a["t"]),
        lambda a, z, c: z * jnp.exp(a["t"]),
    ),
    "several": Mod(
        {"temperature": "", "key": "BS", "table": "3N", "slope": "N"}, _several,
        lambda a, z, c: a["temperature"] * z + a["key"][:, None, None] + jnp.where(
            c.q_segment == 2,
            jnp.moveaxis(a["table"][bucket(c.q_pos - c.k_pos)], -1, 2)[:, 0],
            a["slope"][:, None, None] * c.q_pos,
        ), 0.3,
    ),
    "grouped": Mod(
        {"slope": "K"},  # an integer array chooses the entry
        lambda a: lambda s, h, q, k: s + a["slope"][jnp.asarray(GROUPS)[h] % a["slope"].size] * k,
        lambda a, z, c: z + a["slope"][
            GROUPS[: z.shape[1]] % a["slope"].size
        ][:, None, None] * c.k_pos, 0.1,
    ),
    "no_score": Mod(
        {"width": "N"}, lambda a: lambda s, h, q, k: -(a["width"][h] ** 2) * jnp.abs(q - k),
        lambda a, z, c: 0 * z - a["width"][:, None, None] ** 2 * jnp.abs(c.q_pos - c.k_pos), 0.3,
    ),
    "constant": Mod({}, lambda a: lambda s, h, q, k: 2.0, lambda a, z, c: 0 * z + 2.0),
    "weights": Mod(
        {"w": "S"}, lambda a: lambda s, h, q, k, *, k_index: s + _weights(a["w"][k_index]),
        lambda a, z, c: z + _weights(a["w"]),
    ),
    "holes": Mod(
        {"t": ""},
        lambda a: lambda s, h, q, k: jnp.where((q * k) % 3 == 0, -jnp.inf, s * a["t"]),
        lambda a, z, c: jnp.where((c.q_pos * c.k_pos) % 3 == 0, -jnp.inf, z * a["t"]),
    ),
    "all_holes": Mod(
        {"t": "N"}, lambda a: lambda s, h, q, k: s * a["t"][h] - jnp.inf,
        lambda a, z, c: z * a["t"][:, None, None] - jnp.inf,
    ),
    "steep_padding": Mod(  # its derivative is not a number where the logit is zero
        {"t": "N"}, lambda a: lambda s, h, q, k: jnp.sqrt(s * s * jnp.exp(a["t"][h])),
        lambda a, z, c: jnp.abs(z) * jnp.exp(a["t"][:, None, None] / 2),
    ),
}


def visible(mask: Mask, c: Dense):
    """What a structured mask means, on whole arrays."""
    d = c.q_pos - c.k_pos
    match mask:
        case And():
            return visible(mask.left, c) & visible(mask.right, c)
        case Or():
            return visible(mask.left, c) | visible(mask.right, c)
        case Full():
            return d == d
        case Causal():
            return d >= 0
        case Window():
            return (d < mask.size) & (d >= (-mask.ahead if mask.ahead is not None else -(2**30)))
        case Segments():
            return (c.q_segment == c.k_segment) & (c.q_segment > 0)
        case Prefix():
            return c.k_pos < np.reshape(mask.length, (-1, 1, 1, 1))
        case SinkTokens():
            return (c.k_pos < mask.count) & (d >= 0)
        case Blocks():
            wanted = np.asarray(mask.lists)[:, :, c.q_index[:, 0] // mask.block_q]
            return (wanted[..., None, :] == (c.k_index // mask.block_k)[:, None]).any(-1)
        case MaskMod():
            return (c.head + c.q_pos * c.k_pos) % 3 != 0  # odd, the only one in drawn masks
    raise AssertionError(mask)


def odd(head, q_pos, k_pos):
    return (head + q_pos * k_pos) % 3 != 0


def dense(a: dict, s: Shape, seen, mod: Mod, c: Dense, *, scale, cap=None):
    """``(o, lse)`` by the equation; ``a`` holds q, k, v, "captured" and perhaps sink_logits."""
    repeat = s.N // s.K
    k, v = (jnp.repeat(a[name], repeat, axis=2) for name in "kv")
    z = scale * jnp.einsum("btnh,bsnh->bnts", a["q"], k)
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    z = jnp.broadcast_to(mod.dense(a["captured"], z, c), z.shape)
    live = seen & (z > -jnp.inf)
    z = jnp.where(live, z, 0)
    top = jax.lax.stop_gradient(jnp.where(live, z, -1e9).max(-1, keepdims=True))
    top = jnp.where(top < -1e8, 0, top)
    e = jnp.where(live, jnp.exp(jnp.where(live, z - top, 0)), 0)
    total = e.sum(-1, keepdims=True)
    if "sink_logits" in a:
        total = total + jnp.exp(a["sink_logits"][:, None, None] - top)
    none = total == 0
    total = jnp.where(none, 1, total)
    lse = jnp.where(none, -jnp.inf, top + jnp.log(total))[..., 0]
    return jnp.einsum("bnts,bsnv->btnv", e / total, v), lse.swapaxes(1, 2)
