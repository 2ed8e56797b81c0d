"""Compressed convolutional attention (CCA, with groups CCGQA): attention in a compressed space.

With ``N H = D / C1`` and ``K H = D / C2`` (conventions, not enforced)::

    u_q = x W_Q [T, N, H]    u_k = x W_K [T, K, H]    w = x W_V [T, K, H]
    y_t = b0 + sum_{i < k0} w0_i * u_{t-(k0-1)+i}      depthwise; u = 0 before the document
    z_t = b1 + sum_{j < k1} y_{t-(k1-1)+j} w1_j        dense inside a head; y = b0 before it
    q_n = z_q,n + (u_q,n + u_k,n//G) / 2               qk_mean; on the side of the keys
    k_g = z_k,g + (mean_{n in g} u_q,n + u_k,g) / 2    the mean over the group
    q, k = sqrt(H) q / |q|,  beta_g sqrt(H) k / |k|    qk_norm, in fp32
    q, k = RoPE(q), RoPE(k)
    v_t = [w_t | w_{t-1}]      first | second half of the K H channels; w = 0 before the document
    y = concat_n(softmax(q_n k_{n//G}^T / sqrt(H) + mask) v_{n//G}) W_O

Both convolutions run along time. u is padded once, with k0 + k1 - 2 zero rows (the authors' code),
so y is b0, not 0, in front of a document. The paper's W_V1 and W_V2 are the halves of w_v on its
flat K H axis: for even K the first K/2 heads hold the current token, the others the one before (the
paper's text; a comment in the Hugging Face port, half of each head, contradicts its own shapes).

Differences from the paper: its listing divides by a bare norm (NaN on a zero row), public ports
clamp it in the activation dtype (8e-3 in bf16); here fp32 and eps 1e-12. Its beta is exp(tau);
ports read tau ("raw") or exp(clip(tau, 1e-7, 2)) ("exp_clamp"): pick by checkpoint. Raw starts at
tau = 1 (0 means zero keys, no gradient to W_K), exp_clamp at 1e-3 (no gradient outside its clip).

Sources: Figliolia et al. 2025, arXiv 2510.04476; ZAYA1 2025, arXiv 2511.17127 (C1 = 2, K = 2).
Cache: final k and v, 2 K H numbers a token; a row also keeps k0 + k1 - 2 rows of u and one of w.
Cost: attention FLOPs 1/C1, cache 1/C2 of MHA's; w1 adds a share H k1 / D to q and k projections.
Parallel forms: data, fsdp, tensor over key/value heads (everything is head local).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core.axes import HEADS, KV_HEADS, WIDTH, normal, parameter, zeros
from attnlab.core.cache import KVCache, compact, moves, refuse_truncate, segments_of, take_rows
from attnlab.core.layer import Flops, Mode, refuse_policy
from attnlab.core.linear import project
from attnlab.core.norm import l2_norm
from attnlab.core.types import Out, Seq
from attnlab.layers.gqa import GQA, GQAConfig

TemperatureMode = Literal["exp", "raw", "exp_clamp"]
TAU_START: dict[str, float] = {"exp": 0.0, "raw": 1.0, "exp_clamp": 1e-3}
ConvInit = Literal["torch", "identity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CCAConfig(GQAConfig):
    """Config of CCA; further fields as in ``GQAConfig``, of which bias and value_dim do not exist.

    Args:
        head_dim: H, required: D / (C1 N). num_kv_heads: K, default N (CCA); fewer is CCGQA.
        conv_widths: (k0, k1), taps of the depthwise and of the dense convolution.
        convs: 0 (z = u), 1 (depthwise only, z = y) or 2. value_shift: the second half of v is the
            token before; else it is current like the first. qk_mean: add the q/k means.
            qk_norm: L2 norm of q and k, temperature tau per key/value head.
        norm_eps: added to |q|^2. temperature_mode: beta = exp(tau), tau or exp(clip(tau, 1e-7, 2)).
        conv_bias: b0, b1. conv_init: "torch" (uniform in fan_in**-0.5, ours) or "identity" (z = u).
    """

    qk_norm: bool = True
    norm_eps: float = 1e-12
    conv_widths: tuple[int, int] = (2, 2)
    convs: int = 2
    value_shift: bool = True
    qk_mean: bool = True
    temperature_mode: TemperatureMode = "exp"
    conv_bias: bool = True
    conv_init: ConvInit = "torch"

    bias: ClassVar[bool] = False
    value_dim: ClassVar[int | None] = None

    def __post_init__(self):
        self.require_positive("dim", "num_heads")
        self.require(
            self.head_dim is not None, "head_dim = None", "sets C1 = dim / (num_heads * head_dim)",
            f"use {max(self.dim // (2 * self.num_heads), 1)} for C1 = 2",
        )
        super().__post_init__()
        self.require(
            self.K * self.H % 2 == 0, f"num_kv_heads * head_dim = {self.K * self.H}",
            "must be even: half of the value channels are the previous token's",
            f"use head_dim = {self.H + 1}",
        )
        widths = self.conv_widths
        self.require(
            isinstance(widths, tuple) and len(widths) == 2 and min(widths) >= 1,
            f"conv_widths = {widths}", "is a tuple of two tap counts of at least 1", "use (2, 2)",
        )
        known = {"temperature_mode": get_args(TemperatureMode), "conv_init": get_args(ConvInit)}
        for name, values in (known | {"convs": (0, 1, 2)}).items():
            value = getattr(self, name)
            self.require(value in values, f"{name} = {value!r}", "unknown", f"use one of {values}")

    @property
    def history(self) -> int:
        """Rows of u in front of a chunk that its convolutions read."""
        k0, k1 = self.conv_widths
        return (0, k0 - 1, k0 + k1 - 2)[self.convs]

    def plan(self, seq: Seq, impl: Any = None) -> Seq:
        return seq if moves(seq) else super().plan(seq, impl)

    def build(self, rngs: nnx.Rngs) -> CCA:
        return CCA(self, rngs)

    def param_count(self) -> int:
        N, K, H, (k0, k1) = self.num_heads, self.K, self.H, self.conv_widths
        channel = 2 * self.dim + (0, k0, k0 + H * k1)[self.convs] + self.convs * self.conv_bias
        return (N + K) * H * channel + K * self.qk_norm + N * self.sink_logits

    def flops(self, T: int, S: int, mode: Mode) -> Flops:
        """The depthwise convolution is elementwise, like norms and RoPE: not counted."""
        base = super().flops(T, S, mode)
        dense = (self.num_heads + self.K) * self.H**2 * self.conv_widths[1] * (self.convs == 2)
        return base._replace(linear=base.linear + 2.0 * T * dense)

    def cache_bytes(self, tokens: int, dtype: Any = None) -> int:
        N, K = self.num_heads, self.K
        rows = 2 * K * tokens + (N + K) * self.history + K * self.value_shift
        return rows * self.H * jnp.dtype(dtype or self.precision.cache).itemsize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CCACache(KVCache):
    """Final keys and values, and the rows that the next chunk finds in front of it.

    Args:
        k, v: ``[B, S, K, H]``. u_q, u_k: ``[B, h, N or K, H]``, the last h = k0 + k1 - 2 rows of u.
        w: ``[B, 1, K, H]``, the last row of x W_V (whole rows shard over K), if value_shift.
        past: int32 ``[B, max(h, 1)]``, the segments of these rows, 0 where no token was yet.
    """

    u_q: jax.Array
    u_k: jax.Array
    w: jax.Array
    past: jax.Array

    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = (
        KVCache.AXES
        | {name: ("batch", None, "kv_heads", None) for name in ("u_k", "w")}
        | {"u_q": ("batch", None, "heads", None), "past": ("batch", None)}
    )

    def truncate(self, length):
        raise refuse_truncate("CCACache")


def _taps(x: jax.Array, width: int, segments: jax.Array | None, fill: Any) -> list[jax.Array]:
    """The ``width`` taps of ``x[..., B, width-1+T, C]``, oldest first, ``[..., B, T, C]`` each.

    ``segments[B, >= width-1+T]`` ends with the last row; a tap of another segment reads ``fill``.
    """
    T = x.shape[-2] - width + 1
    taps = [x[..., i : i + T, :] for i in range(width)]
    if segments is not None:
        segments = segments[:, segments.shape[1] - x.shape[-2] :]
        for i in range(width - 1):
            same = (segments[:, i : i + T] == segments[:, width - 1 :]) & (segments[:, -T:] > 0)
            taps[i] = jnp.where(same[..., None], taps[i], fill)
    return taps


class HeadConvs(nnx.Module):
    """Causal convolutions inside heads: depthwise ``w0[n, k0, H]``, dense ``w1[n, k1, H, H]``."""

    def __init__(self, config: CCAConfig, heads: int, axis: str, rngs: nnx.Rngs):
        self.config, self.rows = (c := config), (axis, "batch", "time", None)
        (k0, k1), H, dtype = c.conv_widths, c.H, c.precision.params

        def make(taps: int, unit: jax.Array) -> tuple[nnx.Param, nnx.Param]:
            bound = (taps * unit.size / H) ** -0.5  # fan_in: the taps, times H where dense

            def init(key, shape, dtype):
                if c.conv_init == "torch":
                    return jax.random.uniform(key, shape, dtype, -bound, bound)
                return zeros(key, shape, dtype).at[:, -1].set(unit if len(shape) > 2 else 0)

            axes = (axis, None, "head", None)[: unit.ndim + 2]
            weight = parameter(rngs, init, (heads, taps, *unit.shape), axes, dtype)
            return weight, parameter(rngs, init, (heads, H), (axis, "head"), dtype)

        self.w0, b0 = make(k0, jnp.ones(H))
        self.w1, b1 = make(k1, jnp.eye(H)) if c.convs == 2 else (None, None)
        self.b0, self.b1 = (b0, b1) if c.conv_bias else (None, None)

    def __call__(self, u: jax.Array, segments: jax.Array | None) -> jax.Array:
        """``z[B, T, n, H]`` of ``u[B, h+T, n, H]``, the first h rows in front of the chunk."""
        c, dtype, wide = self.config, u.dtype, jnp.dtype(self.config.precision.softmax)
        k0, k1 = c.conv_widths
        u = u.transpose(2, 0, 1, 3).astype(wide)  # heads in front, where the batched matmul is
        w0 = self.w0[...].astype(wide)[:, :, None, None]
        b0 = jnp.zeros((), wide) if self.b0 is None else self.b0[...].astype(wide)[:, None, None]
        z = sum((w0[:, i] * tap for i, tap in enumerate(_taps(u, k0, segments, 0.0))), b0)
        if self.w1 is not None:
            y = jnp.concatenate(_taps(z, k1, segments, b0), axis=-1).astype(dtype)
            w1 = self.w1[...].reshape(-1, k1 * c.H, c.H)
            z = project("nbtc,nch->nbth", y, w1, self.rows, self.rows, wide.name)
            z = z if self.b1 is None else z.astype(wide) + self.b1[...].astype(wide)[:, None, None]
        return z.astype(dtype).transpose(1, 2, 0, 3)


class CCA(GQA):
    """The module of ``CCAConfig``."""

    config: CCAConfig

    def __init__(self, config: CCAConfig, rngs: nnx.Rngs):
        self.config = c = config
        D, N, K, H = c.dim, c.num_heads, c.K, c.H
        dtype, init = c.precision.params, normal(c.init_std)
        self.w_q = parameter(rngs, init, (D, N, H), ("embed", "heads", "head"), dtype)
        self.w_k = parameter(rngs, init, (D, K, H), ("embed", "kv_heads", "head"), dtype)
        self.w_v = parameter(rngs, init, (D, K, H), ("embed", "kv_heads", "head"), dtype)
        self.w_o = parameter(rngs, init, (N, H, D), ("heads", "head", "embed"), dtype)
        if c.convs:
            self.q_conv = HeadConvs(c, N, "heads", rngs)
            self.k_conv = HeadConvs(c, K, "kv_heads", rngs)
        if c.qk_norm:
            start = jax.nn.initializers.constant(TAU_START[c.temperature_mode])
            self.temperature = parameter(rngs, start, (K,), ("kv_heads",), dtype)
        if c.sink_logits:
            self.sink_logits = parameter(rngs, zeros, (N,), ("heads",), dtype)

    def _rows(self, x, seq, cache: CCACache) -> list[jax.Array]:
        """u_q, u_k, w and the segments of a chunk, behind the rows of the cache in front of it."""
        compute = self.config.precision.compute
        x, wide, rows = x.astype(compute), self.config.precision.softmax, []
        past = ((cache.u_q, self.w_q), (cache.u_k, self.w_k), (cache.w, self.w_v))
        for (old, w), into in zip(past, (HEADS, KV_HEADS, KV_HEADS)):
            u = project("btd,dnh->btnh", x, w[...], WIDTH, into, wide)
            rows.append(jnp.concatenate([old.astype(compute), u], axis=1))
        return [*rows, jnp.concatenate([cache.past, segments_of(seq)], axis=1)]

    def _mix(self, rows, segments, positions) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q, k, v of a chunk from its rows; segments None: one document, nothing to tell apart."""
        u_q, u_k, v = rows
        c, wide = self.config, jnp.dtype(self.config.precision.softmax)
        q, k = u_q[:, c.history :], u_k[:, c.history :]
        z_q, z_k = q, k
        if c.convs:
            z_q, z_k = self.q_conv(u_q, segments), self.k_conv(u_k, segments)
        if c.qk_mean:
            groups = q.reshape(*k.shape[:3], -1, c.H)
            z_q = z_q + 0.5 * (groups + k[:, :, :, None]).reshape(q.shape)
            z_k = z_k + 0.5 * (groups.mean(3) + k)
        if c.qk_norm:
            tau = self.temperature[...].astype(wide)
            tau = jnp.clip(tau, 1e-7, 2.0) if c.temperature_mode == "exp_clamp" else tau
            beta = tau if c.temperature_mode == "raw" else jnp.exp(tau)
            z_q = math.sqrt(c.H) * l2_norm(z_q.astype(wide), c.norm_eps, wide)
            z_k = math.sqrt(c.H) * beta[:, None] * l2_norm(z_k.astype(wide), c.norm_eps, wide)
        q, k = (c.rope.first(z, positions, wide).astype(v.dtype) for z in (z_q, z_k))
        if c.value_shift:
            before, now = _taps(v.reshape(*v.shape[:2], -1), 2, segments, 0.0)
            v = jnp.where(jnp.arange(c.K * c.H) < c.K * c.H // 2, now, before).reshape(k.shape)
        return q, k, v

    def __call__(self, x, seq, *, impl=None, rng=None, state=None, shared=None) -> Out:
        self.check(x, seq)
        x, seq, undo = compact(x, seq)
        *rows, segments = self._rows(x, seq, self.init_cache(x.shape[0], 1))
        one = seq.segments is None or seq.layout == "full"
        q, k, v = self._mix(rows, None if one else segments, seq.positions)
        o = self._mix_values(q, k, v, impl, **seq.keywords(self.config.mask, q.shape[2]))
        return Out(undo(self._finish(x, seq, o)))

    def init_cache(self, batch, capacity, dtype=None, *, policy=None) -> CCACache:
        c = self.config
        refuse_policy(c, policy)
        rows = {"k": (capacity, c.K), "v": (capacity, c.K), "w": (int(c.value_shift), c.K)}
        rows |= {"u_q": (c.history, c.num_heads), "u_k": (c.history, c.K)}
        dtype = jnp.dtype(dtype or c.precision.cache)
        empty = {name: jnp.zeros((batch, *shape, c.H), dtype) for name, shape in rows.items()}
        index = CCACache.empty_index(batch, capacity)
        return CCACache(**index, **empty, past=jnp.zeros((batch, max(c.history, 1)), jnp.int32))

    def _cached(self, x, seq, cache: CCACache, impl, step) -> Out:
        self.check(x, seq, cache)
        x, seq, undo = compact(x, seq)
        rows, now = self._rows(x, seq, cache), segments_of(seq)
        q, k, v = self._mix(rows[:3], rows[3], seq.positions)
        state, real = {}, (now > 0).sum(1, keepdims=True)
        for name, row in zip(("u_q", "u_k", "w", "past"), rows):
            old = getattr(cache, name)  # as many rows, that end at the last real token, replace it
            state[name] = take_rows(row, real + jnp.arange(old.shape[1])).astype(old.dtype)
        cache = dataclasses.replace(cache.write(seq, k=k, v=v), **state)
        y = self._finish(x, seq, self._mix_cached(q, seq, cache, impl, step))
        return Out(undo(y), cache)
