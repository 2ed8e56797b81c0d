"""Grouped-query attention. Multi-head (K = N) and multi-query (K = 1) attention are configs of it.

    q = x W_Q [T, N, H]    k = x W_K [S, K, H]    v = x W_V [S, K, V]
    q, k = RMSNorm(q), RMSNorm(k)           if qk_norm, per head, before RoPE
    q, k = RoPE(q), RoPE(k)                 on the first rotary_fraction of H
    y = concat_n(softmax(scale q_n k_{n // G}^T + mask) v_{n // G}) W_O

Logits pass scale, logit_cap, mask, sink_logits, softmax in that order.

Sources: Vaswani et al. 2017, arXiv 1706.03762 (MHA); Shazeer 2019, arXiv 1911.02150 (MQA); Ainslie
et al. 2023, arXiv 2305.13245 (GQA); Henry et al. 2020, arXiv 2010.04245 (QK-norm, here RMSNorm with
a learned weight as in later models); Xiao et al. 2023, arXiv 2309.17453 (sink tokens).
Cache: keys after RoPE and values, K (H + V) numbers a token.
Parallel forms: data, fsdp, tensor over key/value heads (it divides K; a single one is copied).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core.axes import HEADS, KV_HEADS, WIDTH, constrain, normal, ones, parameter, zeros
from attnlab.core.cache import KVCache, segments_of
from attnlab.core.layer import Flops, Layer, LayerConfig, Mode, refuse_policy, visible_pairs
from attnlab.core.linear import project
from attnlab.core.mask import Causal, Mask, SinkTokens, Window
from attnlab.core.norm import rms_norm
from attnlab.core.paging import Paged, PagedKVCache
from attnlab.core.rope import Pairing, Rope
from attnlab.core.types import Out, Seq
from attnlab.ops.attention import attention
from attnlab.ops.attention.ahead import plan_ahead
from attnlab.ops.attention.decode import decode, decode_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQAConfig(LayerConfig):
    """Config of grouped-query attention.

    Args:
        num_heads: N. num_kv_heads: K, divides N; default N (MHA). head_dim: H, default D / N.
        value_dim: V, default H. qk_norm: RMSNorm of q and k per head. norm_eps: its epsilon.
        rotary_fraction: share of H that turns (0 = none). rope_theta, rope_pairing: see ``Rope``.
        window: visible keys including the query's own, None = all. sink_tokens: first tokens that
            stay visible outside the window. sink_logits: learned logit a head in the denominator.
        logit_cap: c in c tanh(z / c). scale: of the logits, default H**-0.5.
        bias: biases on q, k and v. init_std: of the projections.
    """

    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    qk_norm: bool = False
    norm_eps: float = 1e-6
    rotary_fraction: float = 1.0
    rope_theta: float = 10_000.0
    rope_pairing: Pairing = "half"
    window: int | None = None
    sink_tokens: int = 0
    sink_logits: bool = False
    logit_cap: float | None = None
    scale: float | None = None
    bias: bool = False
    init_std: float = 0.02

    supports: ClassVar[frozenset[str]] = LayerConfig.supports | {"window"}

    def __post_init__(self):
        self.require_positive("dim", "num_heads")
        self._check_heads()
        self.require(
            0 <= self.rotary_fraction <= 1,
            f"rotary_fraction = {self.rotary_fraction}", "is a share of head_dim", "use 0 to 1",
        )
        self.require(
            self.window is None or self.window >= 1,
            f"window = {self.window}", "counts visible keys including the query's own", "use None",
        )
        self.require(
            self.sink_tokens >= 0, f"sink_tokens = {self.sink_tokens}", "is a count", "use 0"
        )
        self.require_above_zero("logit_cap", "scale", "norm_eps")
        self.rope  # noqa: B018 - checks its own width and pairing

    def _check_heads(self) -> None:
        self.require(
            self.head_dim is not None or self.dim % self.num_heads == 0,
            f"num_heads = {self.num_heads}",
            f"must divide dim = {self.dim} when head_dim is not given",
            "set head_dim",
        )
        self._check_widths()
        self.require(
            self.num_heads % self.K == 0,
            f"num_kv_heads = {self.K}",
            f"must divide num_heads = {self.num_heads}",
            f"use one of {[k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]}",
        )

    def _check_widths(self) -> None:
        given = ("num_kv_heads", "head_dim", "value_dim")
        self.require_positive(*(name for name in given if getattr(self, name) is not None))

    # Defaults are not written into the fields: a changed num_heads or head_dim moves them along.

    @property
    def K(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def H(self) -> int:
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def V(self) -> int:
        return self.H if self.value_dim is None else self.value_dim

    @property
    def rope(self) -> Rope:
        return Rope(
            width=2 * int(self.H * self.rotary_fraction / 2),
            theta=self.rope_theta,
            pairing=self.rope_pairing,
        )

    @property
    def mask(self) -> Mask:
        if self.window is None:
            return Causal()
        sight = Window(self.window)
        return Causal() & (sight | SinkTokens(self.sink_tokens) if self.sink_tokens else sight)

    @property
    def heads(self) -> tuple[int, int]:
        """Query and key/value heads of the attention that is computed."""
        return self.num_heads, self.K

    def plan(self, seq: Seq, impl: Any = None) -> Seq:
        return plan_ahead(
            seq, mask=self.mask, heads=self.heads, widths=(self.H, self.V),
            precision=self.precision, sink_logits=self.sink_logits, logit_cap=self.logit_cap,
            impl=impl,
        )

    def build(self, rngs: nnx.Rngs) -> GQA:
        return GQA(self, rngs)

    def param_count(self) -> int:
        D, N, K, H, V = self.dim, self.num_heads, self.K, self.H, self.V
        count = D * (N * H + K * H + K * V) + N * V * D
        count += (N * H + K * H + K * V) if self.bias else 0
        count += 2 * H if self.qk_norm else 0
        return count + (N if self.sink_logits else 0)

    def flops(self, T: int, S: int, mode: Mode) -> Flops:
        D, N, K, H, V = self.dim, self.num_heads, self.K, self.H, self.V
        pair = 2 * N * (H + V)
        return Flops(
            linear=2.0 * T * D * (N * H + K * H + K * V + N * V),
            attention=float(pair * T * S),
            visible=float(pair * visible_pairs(T, S, self.window, self.sink_tokens)),
        )

    def cache_bytes(self, tokens: int, dtype: Any = None) -> int:
        itemsize = jnp.dtype(dtype or self.precision.cache).itemsize
        return tokens * self.K * (self.H + self.V) * itemsize


class GQA(Layer):
    """The module of ``GQAConfig``."""

    config: GQAConfig

    def __init__(self, config: GQAConfig, rngs: nnx.Rngs):
        self.config = c = config
        D, N, K, H, V = c.dim, c.num_heads, c.K, c.H, c.V
        dtype, init = c.precision.params, normal(c.init_std)
        self.w_q = parameter(rngs, init, (D, N, H), ("embed", "heads", "head"), dtype)
        self.w_k = parameter(rngs, init, (D, K, H), ("embed", "kv_heads", "head"), dtype)
        self.w_v = parameter(rngs, init, (D, K, V), ("embed", "kv_heads", "head"), dtype)
        self.w_o = parameter(rngs, init, (N, V, D), ("heads", "head", "embed"), dtype)
        if c.bias:
            self.b_q = parameter(rngs, zeros, (N, H), ("heads", "head"), dtype)
            self.b_k = parameter(rngs, zeros, (K, H), ("kv_heads", "head"), dtype)
            self.b_v = parameter(rngs, zeros, (K, V), ("kv_heads", "head"), dtype)
        if c.qk_norm:
            self.q_norm = parameter(rngs, ones, (H,), ("head",), dtype)
            self.k_norm = parameter(rngs, ones, (H,), ("head",), dtype)
        if c.sink_logits:
            self.sink_logits = parameter(rngs, zeros, (N,), ("heads",), dtype)

    def _project(self, x: jax.Array, seq: Seq) -> tuple[jax.Array, jax.Array, jax.Array]:
        c, compute = self.config, self.config.precision.compute
        wide = jnp.dtype(c.precision.softmax)
        x = x.astype(compute)
        q, k, v = (
            project("btd,dnh->btnh", x, w[...], WIDTH, into, wide.name)
            for w, into in ((self.w_q, HEADS), (self.w_k, KV_HEADS), (self.w_v, KV_HEADS))
        )
        if c.bias:
            q, k, v = (
                (a.astype(wide) + b[...].astype(wide)).astype(compute)
                for a, b in ((q, self.b_q), (k, self.b_k), (v, self.b_v))
            )
        if c.qk_norm:
            q = rms_norm(q, self.q_norm[...], c.norm_eps, wide)
            k = rms_norm(k, self.k_norm[...], c.norm_eps, wide)
        q, k = c.rope.first(q, seq.positions, wide), c.rope.first(k, seq.positions, wide)
        return constrain(q, *HEADS), constrain(k, *KV_HEADS), constrain(v, *KV_HEADS)

    def _mix_values(self, q, k, v, impl, **where) -> jax.Array:
        """What the heads read, ``[B, T, N, V]``, before the output projection.

        ``where``: mask, positions, segments and layout of the tokens, see ``Seq.keywords``.
        """
        c = self.config
        return attention(
            q, k, v, scale=c.scale, sink_logits=self.sink_logits[...] if c.sink_logits else None,
            logit_cap=c.logit_cap, softmax_dtype=c.precision.softmax, impl=impl, **where,
        )

    def _mix_cached(self, q, seq: Seq, cache, impl, step: bool) -> jax.Array:
        """``_mix_values`` over a cache that holds the tokens of ``seq`` already.

        A ``step`` is the decode op's, which reads positions and segments of the cache, whatever
        documents a row holds; only an ``impl`` that this op does not have goes the general way.
        """
        c, names = self.config, decode_names(impl)
        positions, segments = (seq.positions, cache.positions), (segments_of(seq), cache.segments)
        if not step or names == ():
            k, v = (x.astype(q.dtype) for x in cache.rows())
            return self._mix_values(
                q, k, v, impl, mask=c.mask, positions=positions, segments=segments
            )
        return decode(
            q, cache.k, cache.v, lengths=cache.length, pages=getattr(cache, "pages", None),
            positions=positions, segments=segments, window=c.window, sink_tokens=c.sink_tokens,
            sink_logits=self.sink_logits[...] if c.sink_logits else None, logit_cap=c.logit_cap,
            scale=c.scale, softmax_dtype=c.precision.softmax, impl=names,
        )

    def _finish(self, x, seq: Seq, o: jax.Array) -> jax.Array:
        """``y[B, T, D]`` from what the heads read."""
        o = constrain(o, *HEADS)
        return project(
            "btnv,nvd->btd", o, self.w_o[...], HEADS, WIDTH, self.config.precision.softmax
        )

    def __call__(self, x, seq, *, impl=None, rng=None, state=None, shared=None) -> Out:
        self.check(x, seq)
        q, k, v = self._project(x, seq)
        o = self._mix_values(q, k, v, impl, **seq.keywords(self.config.mask, q.shape[2]))
        return Out(self._finish(x, seq, o))

    def init_cache(self, batch, capacity, dtype=None, *, policy=None) -> KVCache | PagedKVCache:
        """The plain cache, or with ``policy=Paged(page)`` a paged one."""
        c = self.config
        args = (batch, capacity, c.K, c.H, c.V, dtype or c.precision.cache)
        if isinstance(policy, Paged):
            return PagedKVCache.empty(*args, policy)
        refuse_policy(c, policy)
        return KVCache.empty(*args)

    def _cached(self, x, seq, cache, impl, step: bool) -> Out:
        """Write the tokens to the cache and read it."""
        self.check(x, seq)
        q, k, v = self._project(x, seq)
        cache = cache.write(seq, k=k, v=v)
        return Out(self._finish(x, seq, self._mix_cached(q, seq, cache, impl, step)), cache)

    def prefill(self, x, seq, cache, *, impl=None) -> Out:
        return self._cached(x, seq, cache, impl, False)

    def decode(self, x, seq, cache, *, impl=None) -> Out:
        self.check_decode(x)
        return self._cached(x, seq, cache, impl, True)
