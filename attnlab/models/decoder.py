"""Pre-norm decoder language model: embedding, a period of layers repeated and scanned, head.

    h = E[tokens]
    for each layer:  h = h + attn(conv(rms_norm(h)));  h = h + swiglu(rms_norm(h))
    logits = rms_norm(h) W_head^T               W_head = E when tied

The period may mix attention variants (one config each); it is repeated ``repeats`` times. The
parameters of one place in the period are stacked over the repeats on a leading ``layers`` axis and
scanned. What layers need of the tokens alone (block lists of masks) is made once, in front of the
stack. What a layer writes to ``shared`` is read by later layers of the same repeat; explicit
state goes in and comes out stacked like the parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core import versions
from attnlab.core.axes import constrain, normal, ones, parameter
from attnlab.core.errors import ConfigError
from attnlab.core.layer import LayerConfig, Mode
from attnlab.core.norm import rms_norm
from attnlab.core.types import Precision, Seq
from attnlab.models.loss import cross_entropy
from attnlab.models.mlp import SwiGLU, round_up, swiglu_flops, swiglu_params
from attnlab.models.short_conv import (
    ConvCache,
    ShortConv,
    conv_flops,
    conv_params,
    state_of,
    with_state,
)

Remat = Literal["none", "full", "dots", "attention"]

# What the backward pass finds saved; everything else inside a period is computed again.
_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("projection"),  # dots on a mesh
    ),
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Config of the decoder.

    Args:
        vocab_size: tokens; tables are padded to ``vocab_multiple`` rows, padding ids never win.
        period: attention configs, one a layer of the period. repeats: how often it is repeated.
        short_conv: taps of a gated short convolution in front of every attention, 0 for none.
        mlp_dim: hidden width of SwiGLU. tied: one table for embedding and head.
        norm_eps, init_std: of the block's norms and projections.
        z_loss: weight of lse^2. loss_chunk: tokens a row in one chunk of logits, None = automatic.
        remat: "none", "full", "dots" (matmul results saved), "attention" (attention outputs and
            log-sum-exps saved). scan: scan over repeats (one compiled body) or unroll them.
    """

    vocab_size: int
    period: tuple[LayerConfig, ...]
    repeats: int
    mlp_dim: int
    short_conv: int = 0
    tied: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    z_loss: float = 0.0
    loss_chunk: int | None = None
    remat: Remat = "none"
    scan: bool = True
    vocab_multiple: int = 64
    precision: Precision = dataclasses.field(default_factory=Precision)

    def __post_init__(self):
        checks = (
            (self.vocab_size >= 2, f"vocab_size = {self.vocab_size}", "must be at least 2", "2"),
            (len(self.period) > 0, "period = ()", "needs at least one attention config", "add one"),
            (self.repeats >= 1, f"repeats = {self.repeats}", "must be at least 1", "use 1"),
            (
                self.short_conv == 0 or self.short_conv >= 2, f"short_conv = {self.short_conv}",
                "is a number of taps, 2 or more", "use 3, or 0 for none",
            ),
            (self.mlp_dim >= 1, f"mlp_dim = {self.mlp_dim}", "must be at least 1", "use 4 * dim"),
            (self.init_std > 0, f"init_std = {self.init_std}", "must be positive", "use 0.02"),
            (self.norm_eps > 0, f"norm_eps = {self.norm_eps}", "must be positive", "use 1e-6"),
            (
                self.vocab_multiple >= 1, f"vocab_multiple = {self.vocab_multiple}",
                "must be at least 1", "use 64",
            ),
            (self.z_loss >= 0, f"z_loss = {self.z_loss}", "must not be negative", "use 0"),
            (
                self.loss_chunk is None or self.loss_chunk >= 1, f"loss_chunk = {self.loss_chunk}",
                "must be at least 1", "use None",
            ),
            (
                self.remat in ("none", *_POLICIES), f"remat = {self.remat!r}", "unknown policy",
                f"use none, {', '.join(_POLICIES)}",
            ),
        )
        for ok, what, rule, fix in checks:
            if not ok:
                raise ConfigError(f"DecoderConfig.{what}", rule, fix)
        if len({c.dim for c in self.period}) != 1:
            raise ConfigError(
                f"DecoderConfig.period has dims {[c.dim for c in self.period]}",
                "every layer works on the same residual stream", "give them one dim",
            )
        self._check_shared()

    def _check_shared(self):
        written: set[str] = set()
        for place, config in enumerate(self.period):
            missing = set(config.reads) - written
            if missing:
                raise ConfigError(
                    f"DecoderConfig.period[{place}] reads {sorted(missing)}",
                    "no earlier layer of the period writes it",
                    "put the writing layer in front",
                )
            written |= set(config.writes)

    @property
    def dim(self) -> int:
        return self.period[0].dim

    @property
    def layers(self) -> int:
        return len(self.period) * self.repeats

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return round_up(self.vocab_size, self.vocab_multiple)

    def param_count(self) -> int:
        D = self.dim
        block = sum(c.param_count() + swiglu_params(D, self.mlp_dim) + 2 * D for c in self.period)
        if self.short_conv:
            block += len(self.period) * conv_params(D, self.short_conv)
        return self.repeats * block + self.rows * D * (1 if self.tied else 2) + D

    def flops(self, tokens: int, keys: int | None = None, mode: Mode = "train") -> float:
        """Useful forward FLOPs of one row: visible attention pairs only, head included."""
        keys = tokens if keys is None else keys
        mlp = swiglu_flops(tokens, self.dim, self.mlp_dim)
        block = sum(c.flops(tokens, keys, mode).useful + mlp for c in self.period)
        if self.short_conv:
            block += len(self.period) * conv_flops(tokens, self.dim)
        return self.repeats * block + 2.0 * tokens * self.dim * self.rows

    def cache_bytes(self, tokens: int, dtype: Any = None) -> int:
        layers = self.repeats * sum(c.cache_bytes(tokens, dtype) for c in self.period)
        rows = max(0, self.short_conv - 1) * self.dim
        return layers + self.layers * rows * jnp.dtype(dtype or self.precision.cache).itemsize

    def build(self, rngs: nnx.Rngs) -> Decoder:
        return Decoder(self, rngs)


class Pass(NamedTuple):
    """What a pass through the stack returns.

    Args:
        h: ``[B, T, D]`` after the final norm. caches, state: one stacked tree a place in the
            period, None where there is none. aux: the layers' scalars, summed.
    """

    h: jax.Array
    caches: list
    state: list
    aux: dict[str, jax.Array]


class Block(nnx.Module):
    """One pre-norm block: attention and SwiGLU, each on the residual stream."""

    def __init__(self, config: DecoderConfig, attention: LayerConfig, rngs: nnx.Rngs):
        self.config = config
        D, dtype = config.dim, config.precision.params
        self.attn_norm = parameter(rngs, ones, (D,), ("embed",), dtype)
        if config.short_conv:
            self.conv = ShortConv(D, config.short_conv, config.precision, rngs)
        self.attn = attention.build(rngs)
        self.mlp_norm = parameter(rngs, ones, (D,), ("embed",), dtype)
        self.mlp = SwiGLU(D, config.mlp_dim, config.precision, config.init_std, rngs)

    def __call__(self, h, seq, step: Mode, impl, *, cache=None, state=None, shared=None, rng=None):
        """``(h, out)``: the residual stream and what the attention returned."""
        c, attention = self.config, self.attn.config
        wide = jnp.dtype(c.precision.softmax)
        x = rms_norm(h, self.attn_norm[...], c.norm_eps, wide)
        keywords: dict[str, Any] = {"impl": impl}
        if attention.reads or attention.writes:
            keywords["shared"] = {name: (shared or {})[name] for name in attention.reads}
        if state is not None:
            keywords["state"] = jax.lax.stop_gradient(state)
        whole, after = cache, None
        if c.short_conv:
            x, after = self.conv(x, seq, None if step == "train" else state_of(cache))
            cache = None if step == "train" else cache.mixer
        if step == "train":
            out = self.attn(x, seq, rng=rng, **keywords)
        else:
            out = getattr(self.attn, step)(x, seq, cache, **keywords)
        if after is not None and step != "train":
            out = dataclasses.replace(out, cache=with_state(out.cache, after, whole))
        if set(out.shared or ()) != set(attention.writes):
            raise ConfigError(
                f"{type(attention).__name__} wrote {sorted(out.shared or ())}",
                f"its config declares writes = {attention.writes}", "make them agree",
            )
        h = h + out.y.astype(h.dtype)
        x = rms_norm(h, self.mlp_norm[...], c.norm_eps, wide)
        return h + self.mlp(x).astype(h.dtype), out

    def init_cache(self, batch: int, capacity: int, dtype=None, *, policy=None) -> Any:
        """The attention's cache, with the state of the convolution where there is one."""
        cache = self.attn.init_cache(batch, capacity, dtype, policy=policy)
        if not self.config.short_conv:
            return cache
        state = self.conv.init_state(batch, dtype or self.config.precision.cache)
        return ConvCache(cache, state.rows, state.segments)


class Decoder(nnx.Module):
    """The module of ``DecoderConfig``."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = c = config
        dtype, init = c.precision.params, normal(c.init_std)
        self.embedding = parameter(rngs, init, (c.rows, c.dim), ("vocab", "embed"), dtype)
        self.blocks = nnx.List([_stack(c, attention, rngs) for attention in c.period])
        self.final_norm = parameter(rngs, ones, (c.dim,), ("embed",), dtype)
        if not c.tied:
            self.head = parameter(rngs, init, (c.rows, c.dim), ("vocab", "embed"), dtype)

    @property
    def table(self) -> jax.Array:
        """The head's table ``[rows, D]``."""
        return self.embedding[...] if self.config.tied else self.head[...]

    def hidden(
        self, tokens, seq: Seq, *, caches=None, state=None, rng=None, step: Mode = "train",
        impl=None,
    ) -> Pass:
        """One pass over ``tokens[B, T]``.

        ``state``: as from ``init_state``, needed where a layer has one. ``rng``: random key of a
        training step, None = evaluation.
        """
        c = self.config
        seq.check(*tokens.shape)
        table = constrain(self.embedding[...], "vocab", "width")  # fsdp gathers rows whole
        h = jnp.take(table, tokens, axis=0).astype(c.precision.compute)
        h = constrain(h, "batch", "time", "width")
        if step == "train":
            for attention in c.period:
                seq = attention.plan(seq, impl)
        out = self._repeat(h, seq, caches, state, rng, step, impl)
        wide = jnp.dtype(c.precision.softmax)
        return out._replace(h=rms_norm(out.h, self.final_norm[...], c.norm_eps, wide))

    def _repeat(self, h, seq, caches, state, rng, step, impl) -> Pass:
        c = self.config
        graphdef, params = versions.split_module(self.blocks)
        none = [None] * len(c.period)
        state = self._check_state(none if state is None else state)
        keys = None if rng is None else jax.random.split(rng, c.repeats)
        over = (params, none if caches is None else caches, state, keys)

        def period(h, one):
            params, caches, states, key = one
            blocks = versions.merge_module(graphdef, params)
            shared, new, aux = {}, ([], []), {}
            for place, block in enumerate(blocks):
                h, out = block(
                    h, seq, step, impl, cache=caches[place], state=states[place], shared=shared,
                    rng=None if key is None else jax.random.fold_in(key, place),
                )
                shared |= out.shared or {}
                new[0].append(out.cache)
                new[1].append(out.state)
                for name, value in (out.aux or {}).items():
                    aux[name] = aux.get(name, 0) + value
            return h, (*new, aux)

        if c.remat != "none" and step == "train":
            period = jax.checkpoint(period, policy=_POLICIES[c.remat])
        if c.scan and c.repeats > 1:
            h, (caches, state, aux) = jax.lax.scan(period, h, over)
        else:
            outs = []
            for i in range(c.repeats):
                h, out = period(h, jax.tree.map(lambda a, i=i: a[i], over))
                outs.append(out)
            caches, state, aux = jax.tree.map(lambda *a: jnp.stack(a), *outs)
        return Pass(h, caches, state, jax.tree.map(lambda a: a.sum(0), aux))

    def _check_state(self, state: list) -> list:
        """Raise ConfigError where a layer has state and the pass was given none."""
        for block, given in zip(_first(self.blocks), state, strict=True):
            if given is None and block.attn.init_state() is not None:
                raise ConfigError(
                    f"state of {type(block.attn).__name__} = None", "this layer carries state",
                    "pass state=decoder.init_state(), or that of the run",
                )
        return state

    def loss(self, tokens, targets, weights, seq: Seq, *, state=None, rng=None, impl=None):
        """``(total, nll, aux, state)``; sums over weighted tokens: divide by ``weights.sum()``."""
        c = self.config
        out = self.hidden(tokens, seq, state=state, rng=rng, impl=impl)
        total, nll = cross_entropy(
            out.h, self.table, targets, weights, vocab_size=c.vocab_size, z_loss=c.z_loss,
            chunk=c.loss_chunk,
        )
        return total, nll, out.aux, out.state

    def logits(self, h: jax.Array) -> jax.Array:
        """``h[..., D]`` to fp32 logits ``[..., vocab_size]``."""
        z = jnp.einsum(
            "...d,vd->...v", h, self.table.astype(h.dtype),
            preferred_element_type=jnp.dtype(self.config.precision.softmax),
        )
        return z[..., : self.config.vocab_size]

    def init_caches(self, batch: int, capacity: int, dtype=None, *, policy=None) -> list:
        """One stacked cache a place in the period; ``policy`` as in the layers' ``init_cache``."""
        return self._each(lambda block: block.init_cache(batch, capacity, dtype, policy=policy))

    def init_state(self) -> list:
        """One stacked state a place in the period, None for layers without one."""
        return self._each(lambda block: block.attn.init_state())

    def _each(self, make) -> list:
        """``make`` of every block of the period, one copy a repeat."""
        repeats = self.config.repeats

        def stack(a):
            return jnp.broadcast_to(a, (repeats, *a.shape))

        return [jax.tree.map(stack, make(block)) for block in _first(self.blocks)]

    def prefill(self, tokens, seq: Seq, caches, *, state=None, impl=None):
        """``(h[B, T, D], caches)``; may be called repeatedly."""
        return self.hidden(tokens, seq, caches=caches, state=state, step="prefill", impl=impl)[:2]

    def decode(self, tokens, seq: Seq, caches, *, state=None, impl=None):
        """``(h[B, t, D], caches)`` for 1 to 8 tokens."""
        return self.hidden(tokens, seq, caches=caches, state=state, step="decode", impl=impl)[:2]

    @staticmethod
    def axes(module: Decoder) -> dict:
        """Logical axes of every parameter; stacked leaves have ``layers`` in front."""
        axes = versions.module_axes(module)
        is_axes = lambda a: isinstance(a, tuple)  # noqa: E731
        axes["blocks"] = jax.tree.map(lambda a: ("layers", *a), axes["blocks"], is_leaf=is_axes)
        return axes


def _stack(config: DecoderConfig, attention: LayerConfig, rngs: nnx.Rngs) -> Block:
    """``repeats`` blocks with independent parameters, stacked leaf by leaf."""
    keys = jax.random.split(rngs.params(), config.repeats)

    def init(key):
        return versions.split_module(Block(config, attention, nnx.Rngs(params=key)))[1]

    graphdef, _ = versions.abstract_split(lambda: Block(config, attention, nnx.Rngs(params=0)))
    return versions.merge_module(graphdef, jax.vmap(init)(keys))


def _first(blocks):
    """The blocks of the first repeat (for what does not depend on parameters)."""
    graphdef, params = versions.split_module(blocks)
    return versions.merge_module(graphdef, jax.tree.map(lambda a: a[0], params))
