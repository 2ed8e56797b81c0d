"""Sparse query attention (SQA): grouped-query attention with fewer query heads than D would hold.

With ``H = D / num_heads_total``, N query heads, K key/value heads and ``M = max(N, K)``::

    q = x W_Q [T, N, H]    k = x W_K [S, K, H]    v = x W_V [S, K, V]
    q, k = RMSNorm(q), RMSNorm(k)           if qk_norm, per head, before RoPE
    q, k = RoPE(q), RoPE(k)
    N >= K: o_n = softmax(scale q_n k_{n // (N/K)}^T + mask) v_{n // (N/K)}       n < M = N
    N <  K: o_j = softmax(scale q_{j mod N} k_j^T + mask) v_j                     j < M = K
    o = sigmoid(x W_G) * o                  if gate, [T, M, V]
    y = concat(o) W_O + b_O                 b_O if out_bias

N = K is plain multi-head attention on N heads. N < K is the reversed form (rSQA): there the
authors' code tiles q along heads, so key/value head j uses query head j mod N, not the blocks of
the other direction, and attention FLOPs scale with K. ``SQAConfig.member`` has the family; with a
window it is SW-SQA. Padding gives zero: b_O is added to real tokens only.

Differences from the authors' library: b_O is on by default there, off here. The gate is off by
default; its weights start at N(1, 0.01) as theirs do: every gate opens with the sum of x. lSQA and
rSQA are future work in the paper, which gives lSQA N = 3/4 of the heads and rSQA only N < K: the
key/value heads of lSQA and both numbers of rSQA are our choice.

Sources: Filipek 2025, arXiv 2510.01817.
Cache: keys after RoPE and values, K (H + V) numbers a token.
Cost: attention FLOPs are M / num_heads_total of multi-head attention's. The members are not matched
in parameters: D (N H + K (H + V) + M V).
Parallel forms: data, fsdp, tensor over key/value heads (it divides N and K; a single is copied).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core.axes import KV_HEADS, WIDTH, constrain, normal, parameter, zeros
from attnlab.core.cache import segments_of
from attnlab.core.errors import ConfigError
from attnlab.core.layer import Flops, Mode
from attnlab.core.linear import project, widened
from attnlab.layers.gqa import GQA, GQAConfig

Member = Literal["sqa", "ssqa", "xsqa", "xsmqa", "lsqa", "rsqa"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SQAConfig(GQAConfig):
    """Config of sparse query attention; the other fields are those of ``GQAConfig``.

    Args:
        num_heads: N, query heads. num_kv_heads: K, default N; one divides the other.
        num_heads_total: heads of the multi-head attention it is compared with; sets the default of
            head_dim, D / num_heads_total. One of the two must be given.
        gate: the sigmoid output gate. out_bias: bias of the output projection.
    """

    num_heads_total: int | None = None
    gate: bool = False
    out_bias: bool = False

    def _check_heads(self) -> None:
        if self.num_heads_total is not None:
            self.require_positive("num_heads_total")
        total = self.num_heads_total
        self.require(
            self.head_dim is not None or (total is not None and self.dim % total == 0),
            f"num_heads_total = {total}",
            f"must divide dim = {self.dim} when head_dim is not given",
            "set head_dim, or num_heads_total to the heads of the MHA it replaces",
        )
        self._check_widths()
        self.require(
            self.num_heads % self.K == 0 or self.K % self.num_heads == 0,
            f"num_heads = {self.num_heads} with num_kv_heads = {self.K}",
            "one must be a multiple of the other", f"use num_heads = {self.K}",
        )

    @property
    def H(self) -> int:
        if self.head_dim is None:
            return self.dim // self.num_heads_total  # type: ignore[operator] - checked
        return self.head_dim

    @staticmethod
    def member(name: Member, *, dim: int, num_heads_total: int, **fields: Any) -> SQAConfig:
        """The named member of the family for a model of ``num_heads_total`` heads.

        (N, K) as shares of the total: sqa (1/2, 1/4), ssqa (1/2, 1/2), xsqa (1/4, 1/4), lsqa
        (3/4, 1/4), rsqa (1/4, 1/2); xsmqa is 1/4 and one key/value head.
        """
        if name not in get_args(Member):
            raise ConfigError(f"member = {name!r}", "unknown", f"use one of {get_args(Member)}")
        if num_heads_total < 4 or num_heads_total % 4:
            raise ConfigError(
                f"num_heads_total = {num_heads_total}", "the members take quarters of it",
                "use a multiple of 4",
            )
        quarter = num_heads_total // 4
        heads = {
            "sqa": (2 * quarter, quarter), "ssqa": (2 * quarter, 2 * quarter),
            "xsqa": (quarter, quarter), "xsmqa": (quarter, 1),
            "lsqa": (3 * quarter, quarter), "rsqa": (quarter, 2 * quarter),
        }[name]
        return SQAConfig(
            dim=dim, num_heads_total=num_heads_total, num_heads=heads[0], num_kv_heads=heads[1],
            **fields,
        )

    @property
    def M(self) -> int:
        """Heads that are computed."""
        return max(self.num_heads, self.K)

    @property
    def heads(self) -> tuple[int, int]:
        return self.M, self.K

    def build(self, rngs: nnx.Rngs) -> SQA:
        return SQA(self, rngs)

    def param_count(self) -> int:
        more = self.M - self.num_heads
        count = super().param_count() + more * self.V * self.dim
        count += self.dim * self.M * self.V if self.gate else 0
        return count + (self.dim if self.out_bias else 0) + (more if self.sink_logits else 0)

    def flops(self, T: int, S: int, mode: Mode) -> Flops:
        base, N, M = super().flops(T, S, mode), self.num_heads, self.M
        rows = M - N + (M if self.gate else 0)
        return Flops(
            linear=base.linear + 2.0 * T * self.dim * self.V * rows,
            attention=base.attention * M / N,
            visible=base.visible * M / N,
        )


class SQA(GQA):
    """The module of ``SQAConfig``."""

    config: SQAConfig

    def __init__(self, config: SQAConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        c, dtype = config, config.precision.params
        D, M, V = c.dim, c.M, c.V
        if c.num_heads < M:
            self.w_o = parameter(
                rngs, normal(c.init_std), (M, V, D), ("kv_heads", "head", "embed"), dtype
            )
            if c.sink_logits:
                self.sink_logits = parameter(rngs, zeros, (M,), ("kv_heads",), dtype)
        if c.gate:
            self.w_g = parameter(rngs, _near_one, (D, M, V), ("embed", self._axis, "head"), dtype)
        if c.out_bias:
            self.b_o = parameter(rngs, zeros, (D,), ("embed",), dtype)

    @property
    def _axis(self) -> str:
        return "heads" if self.config.num_heads == self.config.M else "kv_heads"

    def _project(self, x, seq):
        q, k, v = super()._project(x, seq)
        if self._axis == "kv_heads":  # wide: the gradient of a copied head is a sum over devices
            c = self.config
            copies = jnp.tile(widened(q, c.precision.softmax), (1, 1, c.M // c.num_heads, 1))
            q = constrain(copies.astype(q.dtype), *KV_HEADS)
        return q, k, v

    def _finish(self, x, seq, o) -> jax.Array:
        c, heads = self.config, ("batch", "time", self._axis, None)
        wide = c.precision.softmax
        if c.gate:
            g = project("btd,dmv->btmv", x.astype(o.dtype), self.w_g[...], WIDTH, heads, wide)
            o = jax.nn.sigmoid(g) * o
        o = constrain(o, *heads)
        y = project("btmv,mvd->btd", o, self.w_o[...], heads, WIDTH, wide)
        if c.out_bias:
            real = (segments_of(seq) > 0)[..., None]
            b = jnp.where(real, self.b_o[...].astype(wide), 0)
            y = (y.astype(wide) + b).astype(o.dtype)
        return constrain(y, *WIDTH)


def _near_one(key, shape, dtype):
    return 1 + 0.01 * jax.random.normal(key, shape, dtype)
