"""Any attnlab layer, or a whole decoder, as a Flax Linen module.

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, seq):
            return x + to_linen(GQAConfig(dim=64, num_heads=4), name="attn")(x, seq).y

Parameters lie in the ``params`` collection as plain arrays, in the tree of
``versions.split_module``: ``variables["params"]["attn"]`` is what ``merge_module(graphdef, ...)``
takes. Gradients come back in the same tree. Works under plain jax.jit and jax.grad of ``apply``,
and under ``nn.scan`` and ``nn.remat``, because to Linen these are ordinary parameters; the module
inside is rebuilt around them in every call and keeps nothing (``nnx.bridge``, which keeps a graph
definition in a collection of its own, is not used).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen, nnx

from attnlab.core import versions
from attnlab.core.layer import LayerConfig
from attnlab.core.types import Out, Seq
from attnlab.models.decoder import Decoder, DecoderConfig


def to_linen(
    config: LayerConfig | DecoderConfig, name: str | None = None, *, partitioned: bool = False
) -> linen.Module:
    """The Linen module of a layer or decoder config.

    Args:
        name: of the submodule, as everywhere in Linen.
        partitioned: box parameters as ``nn.LogicallyPartitioned`` with attnlab's logical axes,
            which ``nn.get_partition_spec`` and ``nn.logical_to_mesh`` read. Plain arrays work in
            ``apply`` either way.
    """
    kind = LinenDecoder if isinstance(config, DecoderConfig) else LinenLayer
    return kind(config, partitioned, name=name)


class _Wrapped(linen.Module):
    """The parameters of ``config.build`` as Linen parameters."""

    config: Any
    partitioned: bool = False

    def setup(self):
        _, shapes, axes = _abstract(self.config)
        fresh = functools.cache(lambda: _initial(self.config, self.make_rng("params")))

        def init(_, name):
            # Linen calls this for existing parameters too, to compare shapes: build nothing then.
            if self.has_variable("params", name):
                value = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[name])
            else:
                value = fresh()[name]
            if not self.partitioned:
                return value
            box = lambda a, v: linen.LogicallyPartitioned(v, names=a)  # noqa: E731
            return jax.tree.map(box, axes[name], value, is_leaf=_is_axes)

        self.weights = {name: self.param(name, init, name) for name in shapes}

    def _module(self) -> Any:
        return versions.merge_module(_abstract(self.config)[0], core.unfreeze(self.weights))


class LinenLayer(_Wrapped):
    """An attention layer: the four methods of ``core.layer.Layer``, reached through ``method=``."""

    def __call__(self, x, seq: Seq, *, impl=None, rng=None, state=None, shared=None) -> Out:
        """``Out`` with ``y[B, T, D]`` of ``x[B, T, D]``."""
        return self._module()(x, seq, impl=impl, rng=rng, state=state, shared=shared)

    def init_cache(self, batch: int, capacity: int, dtype=None, *, policy=None):
        return self._module().init_cache(batch, capacity, dtype, policy=policy)

    def prefill(self, x, seq: Seq, cache, *, impl=None) -> Out:
        return self._module().prefill(x, seq, cache, impl=impl)

    def decode(self, x, seq: Seq, cache, *, impl=None) -> Out:
        return self._module().decode(x, seq, cache, impl=impl)


class LinenDecoder(_Wrapped):
    """A decoder: tokens ``[B, T]`` in, fp32 logits ``[B, T, vocab_size]`` in ``Out.y``."""

    def __call__(self, tokens, seq: Seq, *, impl=None) -> Out:
        module = self._module()
        out = module.hidden(tokens, seq, impl=impl)
        return Out(module.logits(out.h), None, out.aux or None)

    def init_cache(self, batch: int, capacity: int, dtype=None):
        return self._module().init_caches(batch, capacity, dtype)

    def prefill(self, tokens, seq: Seq, cache, *, impl=None) -> Out:
        module = self._module()
        h, cache = module.prefill(tokens, seq, cache, impl=impl)
        return Out(module.logits(h), cache)

    def decode(self, tokens, seq: Seq, cache, *, impl=None) -> Out:
        module = self._module()
        h, cache = module.decode(tokens, seq, cache, impl=impl)
        return Out(module.logits(h), cache)


def _is_axes(a: Any) -> bool:
    return isinstance(a, tuple)


def _initial(config, key) -> dict:
    return versions.split_module(config.build(nnx.Rngs(params=key)))[1]


@functools.lru_cache(maxsize=256)
def _abstract(config) -> tuple[Any, dict, dict]:
    """``(graphdef, shapes, axes)`` of ``config.build``, without computing anything."""
    box: list[Any] = []

    def build():
        module = config.build(nnx.Rngs(params=0))
        decoder = isinstance(module, Decoder)
        box.append(Decoder.axes(module) if decoder else versions.module_axes(module))
        return module

    graphdef, shapes = versions.abstract_split(build)
    return graphdef, shapes, box[0]
