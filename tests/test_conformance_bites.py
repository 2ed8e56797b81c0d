"""The conformance checks can fail: each broken layer is caught by the check named beside it."""

from __future__ import annotations

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subject import CHECKS, NEEDS_CACHE, Subject
from test_conformance import run

from attnlab.core.cache import KVCache, segments_of
from attnlab.core.layer import Layer
from attnlab.core.mask import Causal, Full, Window
from attnlab.core.types import Out, Seq
from attnlab.layers.gqa import GQA, GQAConfig

MUTANTS: dict[type, tuple[str, ...]] = {}


def caught_by(*titles: str):
    """Register a mutant of GQA: a class of methods laid over the module's or the config's."""

    def register(mixin: type) -> type:
        MUTANTS[mixin] = titles
        return mixin

    return register


class OnModule:
    """Methods replace the module's."""


class OnConfig:
    """Methods replace the config's."""


@caught_by("causality", "fp64_equals_the_oracle")
class SeesOneTokenAhead(OnConfig):
    mask = property(lambda self: Window(10_000, ahead=1))


@caught_by("causality", "fp64_equals_the_oracle")
class WindowOneTooWide(OnConfig):
    mask = property(lambda self: Causal() & Window(self.window + 1))


@caught_by("split_prefill", "decode_is_train", "ragged_prompts")
class AttendsByArrayIndex(OnModule):
    def _cached(self, x, seq, cache, impl, step):
        index = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        return GQA._cached(self, x, dataclasses.replace(seq, positions=index), cache, impl, step)


@caught_by("packing_is_separate_documents", "causality")
class ForgetsSegments(OnModule):
    def __call__(self, x, seq, **kw):
        one = jnp.minimum(segments_of(seq), 1)
        return GQA.__call__(self, x, Seq(seq.positions, one), **kw)


@caught_by("packing_is_separate_documents", "causality")
class ConvolvesAcrossDocuments(OnModule):
    def __call__(self, x, seq, **kw):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return GQA.__call__(self, x + 0.1 * before, seq, **kw)


@caught_by("padding_is_inert", "fp64_equals_the_oracle")
class SeesPadding(OnModule):
    def __call__(self, x, seq, **kw):
        return GQA.__call__(self, x, Seq(seq.positions, segments_of(seq) + 1), **kw)


@caught_by("empty_row_is_finite")
class DividesByRealTokens(OnModule):
    def __call__(self, x, seq, **kw):
        real = (segments_of(seq) > 0).sum(1)[:, None, None].astype(x.dtype)
        return Out(GQA.__call__(self, x, seq, **kw).y * (real / real))


@caught_by("rows_are_independent")
class MixesTheBatch(OnModule):
    def __call__(self, x, seq, **kw):
        return GQA.__call__(self, x + 0.01 * x.mean(0, keepdims=True), seq, **kw)


@caught_by("positions_are_relative", "fp64_equals_the_oracle")
class AddsAbsolutePositions(OnModule):
    def __call__(self, x, seq, **kw):
        return GQA.__call__(self, x + jnp.sin(seq.positions)[..., None].astype(x.dtype), seq, **kw)


@caught_by("fp64_equals_the_oracle", "fp32_budget")
class WrongHeadGroups(OnModule):
    def _project(self, x, seq):
        q, k, v = GQA._project(self, x, seq)
        return q[:, :, np.array([0, 2, 1, 3])], k, v


@caught_by("fp64_equals_the_oracle", "every_parameter_has_gradient")
class StopsAGradient(OnModule):
    def _project(self, x, seq):
        q, k, v = GQA._project(self, x, seq)
        return q, jax.lax.stop_gradient(k), v


@caught_by("fp32_budget")
class RoundsToBfloat16(OnModule):
    def _mix_values(self, q, k, v, *rest, **where):
        q, k, v = (a.astype("bfloat16") for a in (q, k, v))
        return GQA._mix_values(self, q, k, v, *rest, **where).astype("float32")


@caught_by("decode_is_train", "decode_several", "mixed_prefill_and_decode", "far_positions")
class DecodesWithAnotherScale(OnModule):
    def decode(self, x, seq, cache, *, impl=None):
        return GQA.prefill(self, 1.01 * x, seq, cache, impl=impl)


@caught_by("ragged_prompts", "split_prefill")
class WritesPadding(OnModule):
    def prefill(self, x, seq, cache, *, impl=None):
        out = GQA.prefill(self, x, seq, cache, impl=impl)
        new = cache.length + x.shape[1]
        return Out(out.y, dataclasses.replace(out.cache, length=new))


@caught_by("cache_is_a_carry")
class CacheTakesTheComputeDtype(OnModule):
    def prefill(self, x, seq, cache, *, impl=None):
        out = GQA.prefill(self, x, seq, cache, impl=impl)
        return Out(out.y, dataclasses.replace(out.cache, k=out.cache.k.astype("float32")))


class LeakyCache(KVCache):
    """Drops tokens that do not fit, and hides what is truncated without giving back its slots."""

    def _check_room(self, tokens, total):
        pass

    def truncate(self, length):
        return dataclasses.replace(KVCache.truncate(self, length), length=self.length)


jax.tree_util.register_dataclass(
    LeakyCache, data_fields=[f.name for f in dataclasses.fields(KVCache)], meta_fields=[]
)


@caught_by("overflow_raises", "truncate_rewinds")
class UsesALeakyCache(OnModule):
    def init_cache(self, *args, **kw):
        cache = GQA.init_cache(self, *args, **kw)
        return LeakyCache(**{f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)})


@caught_by("flops_are_counted")
class ForgetsTheOutputProjection(OnConfig):
    def flops(self, T, S, mode):
        flops = GQAConfig.flops(self, T, S, mode)
        return flops._replace(linear=flops.linear - 2.0 * T * self.dim * self.num_heads * self.V)


@caught_by("cache_bytes_are_true")
class CountsOnlyKeys(OnConfig):
    def cache_bytes(self, tokens, dtype=None):
        return GQAConfig.cache_bytes(self, tokens, dtype) // 2


@caught_by("parameters_counted_and_named")
class MiscountsParameters(OnConfig):
    def param_count(self):
        return GQAConfig.param_count(self) - 1


@caught_by("config_guards_itself")
class ChecksNothing(OnConfig):
    def __post_init__(self):
        for name in ("num_kv_heads", "head_dim", "value_dim"):
            if getattr(self, name) is None:
                default = self.num_heads if name == "num_kv_heads" else 6
                object.__setattr__(self, name, default)


@caught_by("same_bits_twice")
class DrawsNoise(OnModule):
    """A forward pass that depends on when it ran."""

    def __call__(self, x, seq, **kw):
        noise = jax.pure_callback(_noise, jax.ShapeDtypeStruct((), x.dtype))
        return GQA.__call__(self, x + jax.lax.stop_gradient(noise), seq, **kw)


def _noise():
    return np.float32(np.random.default_rng().standard_normal())


def broken(mixin: type) -> Subject:
    """GQA with a window, with the mutant's methods."""
    module = type(mixin.__name__, (mixin, GQA) if issubclass(mixin, OnModule) else (GQA,), {})
    fields = {"build": lambda self, rngs: module(self, rngs)}
    bases = (mixin, GQAConfig) if issubclass(mixin, OnConfig) else (GQAConfig,)
    config = type(mixin.__name__ + "Config", bases, fields)
    case = cases.CASES["gqa"]
    tiny = {"dim": 24, "num_heads": 4, "num_kv_heads": 2, "window": 5}
    return Subject("gqa0", dataclasses.replace(case, configs=(tiny,)), config(**tiny))


@pytest.mark.parametrize("mixin", MUTANTS, ids=lambda mixin: mixin.__name__)
def test_mutant_is_caught(mixin: type):
    subject = broken(mixin)
    for title in MUTANTS[mixin]:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            CHECKS[title](subject)


def test_the_healthy_layer_passes_the_same_checks():
    class Healthy(OnModule):
        pass

    subject = broken(Healthy)
    for title in sorted({title for titles in MUTANTS.values() for title in titles}):
        CHECKS[title](subject)


def encoder(**methods) -> Subject:
    """GQA as an encoder; ``methods`` of the module."""
    module = type("Encoder", (GQA,), methods)
    config = type(
        "EncoderConfig", (GQAConfig,),
        {"causal": False, "decode": False, "mask": property(lambda self: Full()),
         "build": lambda self, rngs: module(self, rngs)},
    )
    tiny = {"dim": 24, "num_heads": 4}
    return Subject("gqa0", dataclasses.replace(cases.CASES["gqa"], configs=(tiny,)), config(**tiny))


def test_a_layer_that_declares_less_must_refuse():
    refusing = {name: getattr(Layer, name) for name in ("init_cache", "prefill", "decode")}
    honest = encoder(**refusing)
    for title in ("causality", "no_decode_raises", "padding_is_inert", "out_in_every_mode"):
        assert title not in NEEDS_CACHE
        run(honest, title)
    with pytest.raises(AssertionError, match="future"):
        CHECKS["causality"](honest)
    with pytest.raises(pytest.fail.Exception):
        run(encoder(), "no_decode_raises")  # it kept its cache
