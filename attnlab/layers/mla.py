"""Multi-head latent attention: one low-rank latent a token is cached instead of keys and values.

    c_q = RMSNorm(x W_DQ) [T, Q]         q_n | q_r = c_q W_UQ [T, N, nope | P]    (or x W_Q)
    c | k_r = x W_DKV [S, R | P]         c = RMSNorm(c)              k_r: one head for all N
    q_r, k_r = RoPE(q_r), RoPE(k_r)      k_n | v = c W_UKV [S, N, nope | V]
    z = (nope + P)^-1/2 m^2 (q_n k_n^T + q_r k_r^T)                  m^2: YaRN's softmax factor
    y = concat_n(softmax(z + mask) v) W_O

Two forms of the same function. Expanded: ``k = [k_n | k_r]`` and ``v`` are built for every head.
Absorbed: ``W_UK`` moves to the query, ``q_n W_UK^T``; one key ``[c | k_r]`` of width R + P and the
value ``c`` serve all heads, and ``W_UV`` is applied to the N outputs of width R. Expanding the
cached tokens costs more than it saves below ``crossover(config)`` new tokens.

Differences from the papers: none in the function. Published modules that cache expanded keys and
values lose the saving; this one always caches the latent. ``latent_norm=False`` (both norms off) is
for checkpoints converted from grouped-query attention (Meng et al. 2025, arXiv 2502.07864).
Sources: DeepSeek-AI 2024, arXiv 2405.04434 (V2); DeepSeek-AI 2024, arXiv 2412.19437 (V3).
Cache: latent after its norm and rotary key after RoPE, R + P numbers a token (V3: 512 + 64).
Parallel forms: data, fsdp, tensor over heads (latent, rotary key and cache stay replicated).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core.axes import HEADS, WIDTH, constrain, normal, ones, parameter
from attnlab.core.cache import LatentCache, segments_of
from attnlab.core.layer import Flops, Layer, LayerConfig, Mode, refuse_policy, visible_pairs
from attnlab.core.linear import project, widened
from attnlab.core.mask import Causal, Mask, Window
from attnlab.core.norm import rms_norm
from attnlab.core.rope import Pairing, Rope, Yarn
from attnlab.core.types import Out, Seq
from attnlab.ops.attention import attention
from attnlab.ops.attention.ahead import plan_ahead

Form = Literal["absorbed", "expanded"]
LATENT = ("batch", "time", "latent")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(LayerConfig):
    """Config of multi-head latent attention.

    Args:
        num_heads: N. kv_rank: R, width of the cached latent. q_rank: Q of the query latent, None =
            no query compression.
        nope_dim, rope_dim: widths of the two parts of q and k, in the order [nope | rope]; rope_dim
            is P, 0 = no RoPE. value_dim: V.
        latent_norm: RMSNorm of both latents (never of the rotary key). norm_eps: its epsilon.
        rope_theta, rope_pairing, yarn: see ``Rope``; yarn also scales the logits.
        scale: of the logits, default (nope_dim + rope_dim)**-0.5 times yarn's softmax factor;
            a value given here is used as it is.
        window: visible keys including the query's own, None = all.
        decode_form: of cached passes. "auto": decode absorbed, prefill by ``crossover``; a named
            form holds for both. Training is always expanded.
        init_std: of the projections (DeepSeek-V3: 0.006).
    """

    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    q_rank: int | None = None
    latent_norm: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_pairing: Pairing = "interleaved"
    yarn: Yarn | None = None
    scale: float | None = None
    window: int | None = None
    decode_form: Literal["auto", "absorbed", "expanded"] = "auto"
    init_std: float = 0.02

    supports: ClassVar[frozenset[str]] = LayerConfig.supports | {"window"}

    def __post_init__(self):
        self.require_positive("dim", "num_heads", "kv_rank", "nope_dim", "value_dim")
        if self.q_rank is not None:
            self.require_positive("q_rank")
        self.require(
            isinstance(self.rope_dim, int) and self.rope_dim >= 0 and self.rope_dim % 2 == 0,
            f"rope_dim = {self.rope_dim!r}", "must be even and not negative",
            "round it down; 0 switches RoPE off",
        )
        self.require(
            self.window is None or self.window >= 1,
            f"window = {self.window}", "counts visible keys including the query's own", "use None",
        )
        self.require_above_zero("scale", "norm_eps")
        self.require(
            self.decode_form in ("auto", "absorbed", "expanded"),
            f"decode_form = {self.decode_form!r}", "is not a form of cached passes",
            'use "auto", "absorbed" or "expanded"',
        )
        self.rope  # noqa: B018 - checks its own pairing

    @classmethod
    def deepseek_v3(cls, **changes: Any) -> MLAConfig:
        """Attention of the released DeepSeek-V3 (61 layers), at its extended context."""
        fields: dict[str, Any] = dict(
            dim=7168, num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64,
            value_dim=128, yarn=Yarn(factor=40), init_std=0.006,
        )
        return cls(**fields | changes)

    @classmethod
    def deepseek_v2_lite(cls, **changes: Any) -> MLAConfig:
        """Attention of the released DeepSeek-V2-Lite (27 layers, no query compression)."""
        fields: dict[str, Any] = dict(
            dim=2048, num_heads=16, kv_rank=512, nope_dim=128, rope_dim=64,
            value_dim=128, yarn=Yarn(factor=40, mscale=0.707), init_std=0.006,
        )
        return cls(**fields | changes)

    @property
    def H(self) -> int:
        """Width of q and k in the expanded form."""
        return self.nope_dim + self.rope_dim

    @property
    def rope(self) -> Rope:
        return Rope(
            width=self.rope_dim, theta=self.rope_theta, pairing=self.rope_pairing, yarn=self.yarn
        )

    @property
    def logit_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        return self.H**-0.5 * (1.0 if self.yarn is None else self.yarn.softmax_factor)

    @property
    def mask(self) -> Mask:
        return Causal() if self.window is None else Causal() & Window(self.window)

    def form(self, tokens: int, mode: Mode) -> Form:
        """The form in which ``tokens`` new tokens run."""
        if mode == "train":
            return "expanded"
        if self.decode_form != "auto":
            return self.decode_form
        return "absorbed" if mode == "decode" or tokens < crossover(self) else "expanded"

    def plan(self, seq: Seq, impl: Any = None) -> Seq:
        return plan_ahead(
            seq, mask=self.mask, heads=(self.num_heads, self.num_heads), precision=self.precision,
            widths=(self.H, self.value_dim), impl=impl,
        )

    def build(self, rngs: nnx.Rngs) -> MLA:
        return MLA(self, rngs)

    def param_count(self) -> int:
        D, N, R, Q, P = self.dim, self.num_heads, self.kv_rank, self.q_rank, self.rope_dim
        query = D * N * self.H if Q is None else D * Q + Q * N * self.H
        norms = (R + (Q or 0)) if self.latent_norm else 0
        up = R * N * (self.nope_dim + self.value_dim)
        return query + D * (R + P) + up + N * self.value_dim * D + norms

    def flops(self, T: int, S: int, mode: Mode) -> Flops:
        """As executed: the expanded form builds keys and values of all S tokens, cached or new."""
        D, N, R, Q, P = self.dim, self.num_heads, self.kv_rank, self.q_rank, self.rope_dim
        V, H, expanded = self.value_dim, self.H, self.form(T, mode) == "expanded"
        query = D * N * H if Q is None else D * Q + Q * N * H
        up = (S if expanded else T) * R * N * (self.nope_dim + V)
        pair = 2 * N * (H + V if expanded else 2 * R + P)
        return Flops(
            linear=2.0 * (T * (query + D * (R + P) + N * V * D) + up),
            attention=float(pair * T * S),
            visible=float(pair * visible_pairs(T, S, self.window)),
        )

    def cache_bytes(self, tokens: int, dtype: Any = None) -> int:
        itemsize = jnp.dtype(dtype or self.precision.cache).itemsize
        return tokens * (self.kv_rank + self.rope_dim) * itemsize


def crossover(config: MLAConfig) -> float:
    """New tokens from which the expanded form costs fewer FLOPs than the absorbed one.

    For n new tokens over S cached ones, expanding costs ``2 S N R (nope + V)`` once and saves
    ``2 S N n ((2R + P) - (nope + P + V))`` in the logits and the weighted sums::

        n* = R (nope + V) / ((2R + P) - (nope + P + V))

    DeepSeek-V3: 512 * 256 / 768 = 171. Infinite where the absorbed pair is the cheaper one.
    """
    R, P, V = config.kv_rank, config.rope_dim, config.value_dim
    saved = (2 * R + P) - (config.H + V)
    return R * (config.nope_dim + V) / saved if saved > 0 else float("inf")


class MLA(Layer):
    """The module of ``MLAConfig``. ``w_ukv[R, N, nope | V]``: key columns first, then values."""

    config: MLAConfig

    def __init__(self, config: MLAConfig, rngs: nnx.Rngs):
        self.config = c = config
        D, N, R, Q, P = c.dim, c.num_heads, c.kv_rank, c.q_rank, c.rope_dim
        dtype, init = c.precision.params, normal(c.init_std)
        if Q is None:
            self.w_q = parameter(rngs, init, (D, N, c.H), ("embed", "heads", "head"), dtype)
        else:
            self.w_dq = parameter(rngs, init, (D, Q), ("embed", None), dtype)
            self.w_uq = parameter(rngs, init, (Q, N, c.H), (None, "heads", "head"), dtype)
        self.w_dkv = parameter(rngs, init, (D, R + P), ("embed", "latent"), dtype)
        up = (R, N, c.nope_dim + c.value_dim)
        self.w_ukv = parameter(rngs, init, up, ("latent", "heads", "head"), dtype)
        self.w_o = parameter(rngs, init, (N, c.value_dim, D), ("heads", "head", "embed"), dtype)
        if c.latent_norm:
            self.kv_norm = parameter(rngs, ones, (R,), ("latent",), dtype)
            if Q is not None:
                self.q_norm = parameter(rngs, ones, (Q,), (None,), dtype)

    def _project(self, x, seq: Seq) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """``q_nope[B, T, N, nope], q_rope[B, T, N, P], latent[B, T, R], k_rope[B, T, P]``."""
        c, compute = self.config, self.config.precision.compute
        wide = jnp.dtype(c.precision.softmax)
        x = x.astype(compute)
        if c.q_rank is None:
            q = project("btd,dnh->btnh", x, self.w_q[...], WIDTH, HEADS, wide.name)
        else:
            down = project("btd,dq->btq", x, self.w_dq[...], WIDTH, LATENT, wide.name)
            if c.latent_norm:
                down = rms_norm(down, self.q_norm[...], c.norm_eps, wide)
            q = project("btq,qnh->btnh", down, self.w_uq[...], LATENT, HEADS, wide.name)
        q = constrain(q, *HEADS)
        down = project("btd,dr->btr", x, self.w_dkv[...], WIDTH, LATENT, wide.name)
        latent, k_rope = jnp.split(down, [c.kv_rank], axis=-1)
        if c.latent_norm:
            latent = rms_norm(latent, self.kv_norm[...], c.norm_eps, wide)
        q_nope, q_rope = jnp.split(q, [c.nope_dim], axis=-1)
        q_rope = c.rope(q_rope, seq.positions, wide)
        k_rope = c.rope(k_rope[:, :, None], seq.positions, wide)[:, :, 0]
        latent = constrain(latent, *LATENT)
        return q_nope, q_rope, latent, constrain(k_rope, "batch", "time", None)

    def _attend(self, q_nope, q_rope, latent, k_rope, form: Form, **call) -> jax.Array:
        c = self.config
        up, wide = self.w_ukv[...], c.precision.softmax
        w_uk, w_uv = jnp.split(up.astype(latent.dtype), [c.nope_dim], axis=-1)
        if form == "expanded":
            kv = project("bsr,rnh->bsnh", latent, up, LATENT, HEADS, wide)
            k, v = jnp.split(kv, [c.nope_dim], axis=-1)
            # Repeated wide: its gradient is a sum over heads, which devices may share.
            rope = widened(k_rope, wide)[:, :, None]
            rope = jnp.broadcast_to(rope, (*k.shape[:3], c.rope_dim))
            q = jnp.concatenate([q_nope, q_rope], -1)
            k = jnp.concatenate([k, rope.astype(k.dtype)], -1)
            k, v = (constrain(a, *HEADS) for a in (k, v))
        else:  # one key/value head; the value is the first R columns of the key
            q = jnp.concatenate([self._absorb("btnh,rnh->btnr", q_nope, w_uk), q_rope], -1)
            q = constrain(q, *HEADS)
            k, v = jnp.concatenate([latent, k_rope], -1)[:, :, None], latent[:, :, None]
        o = attention(q, k, v, scale=c.logit_scale, softmax_dtype=wide, **call)
        if form == "absorbed":
            o = self._absorb("btnr,rnv->btnv", o, w_uv)
        o = constrain(o, *HEADS)
        return project("btnv,nvd->btd", o, self.w_o[...], HEADS, WIDTH, wide)

    def _absorb(self, equation: str, a: jax.Array, w: jax.Array) -> jax.Array:
        """A product the expanded form does not have: accumulated wide, rounded once."""
        wide = jnp.promote_types(a.dtype, self.config.precision.softmax)
        return jnp.einsum(equation, a, w, preferred_element_type=wide).astype(a.dtype)

    def __call__(self, x, seq, *, impl=None, rng=None, state=None, shared=None) -> Out:
        self.check(x, seq)
        parts, where = self._project(x, seq), seq.keywords(self.config.mask, self.config.num_heads)
        return Out(self._attend(*parts, self.config.form(x.shape[1], "train"), impl=impl, **where))

    def init_cache(self, batch, capacity, dtype=None, *, policy=None) -> LatentCache:
        c = self.config
        refuse_policy(c, policy)
        dtype = dtype or c.precision.cache
        return LatentCache.empty(batch, capacity, c.kv_rank, c.rope_dim, dtype)

    def prefill(self, x, seq, cache: LatentCache, *, impl=None) -> Out:
        return self._cached(x, seq, cache, impl, "prefill")

    def decode(self, x, seq, cache: LatentCache, *, impl=None) -> Out:
        self.check_decode(x)
        return self._cached(x, seq, cache, impl, "decode")

    def _cached(self, x, seq, cache: LatentCache, impl, mode: Mode) -> Out:
        self.check(x, seq)
        q_nope, q_rope, latent, k_rope = self._project(x, seq)
        cache = cache.write(seq, latent=latent, k_rope=k_rope)
        return Out(self._attend(
            q_nope, q_rope, cache.latent.astype(latent.dtype), cache.k_rope.astype(latent.dtype),
            self.config.form(x.shape[1], mode), impl=impl, mask=self.config.mask,
            positions=(seq.positions, cache.positions), segments=(segments_of(seq), cache.segments),
        ), cache)
