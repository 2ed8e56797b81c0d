"""The contract of an attention layer: a frozen config that checks itself and builds a module.

``Layer`` holds static config and parameters, nothing else. Cache, random keys, masks and state are
arguments; nothing is mutated in a forward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from attnlab.core.errors import ConfigError, ShapeError, UnsupportedError
from attnlab.core.types import Out, Precision, Seq

Mode = Literal["train", "prefill", "decode"]
MAX_DECODE = 8


class Flops(NamedTuple):
    """Forward FLOPs of one sequence (a multiply and an add are two).

    Args:
        linear: projections, convolutions, everything linear in T.
        attention: every query against every key, as a dense reference computes it.
        visible: the part of ``attention`` on pairs the mask lets through; what MFU counts.
    """

    linear: float
    attention: float
    visible: float

    @property
    def dense(self) -> float:
        """What the reference executes."""
        return self.linear + self.attention

    @property
    def useful(self) -> float:
        """What MFU counts."""
        return self.linear + self.visible


def visible_pairs(T: int, S: int, window: int | None = None, sinks: int = 0) -> int:
    """Causal (query, key) pairs when T queries stand at the end of S keys.

    In a window where one is given, with the first ``sinks`` keys visible outside it.
    """
    last = S - T + 1 + np.arange(T)  # keys up to each query
    if window is None:
        return int(last.sum())
    return int((np.minimum(last, window) + np.clip(last - window, 0, sinks)).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Base of all layer configs.

    Args:
        dim: model width D. precision: the four dtypes.

    ``reads`` and ``writes`` are names in the dict that a stack hands from layer to layer: a layer
    that declares any gets ``shared=`` (what it reads) in every mode and returns what it writes in
    ``Out.shared``.
    """

    dim: int
    precision: Precision = dataclasses.field(default_factory=Precision)

    causal: ClassVar[bool] = True
    decode: ClassVar[bool] = True
    supports: ClassVar[frozenset[str]] = frozenset({"packing", "decode", "dp", "fsdp", "tp"})
    reads: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ()

    def require(self, ok: bool, what: str, rule: str, fix: str) -> None:
        """Raise ConfigError(what, rule, fix) unless ``ok``; used by ``__post_init__``."""
        if not ok:
            raise ConfigError(f"{type(self).__name__}.{what}", rule, fix)

    def require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self.require(
                isinstance(value, int) and value >= 1,
                f"{name} = {value!r}", "must be an integer of at least 1", f"set {name} to 1",
            )

    def require_above_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self.require(
                value is None or value > 0,
                f"{name} = {value}", "must be positive", "leave it out for the default",
            )

    def plan(self, seq: Seq, impl: Any = None) -> Seq:
        """``seq`` with what the training pass of this layer needs of it and no activation changes.

        A stack calls it once for each of its layers and hands the result to all of them. A layer
        must do without; by default nothing is planned. See ``ops.attention.ahead``.
        """
        return seq

    def build(self, rngs: nnx.Rngs) -> Layer:
        raise NotImplementedError(f"{type(self).__name__}.build")

    def flops(self, T: int, S: int, mode: Mode) -> Flops:
        raise NotImplementedError(f"{type(self).__name__}.flops")

    def param_count(self) -> int:
        raise NotImplementedError(f"{type(self).__name__}.param_count")

    def cache_bytes(self, tokens: int, dtype: Any = None) -> int:
        """Bytes of keys, values and running state for one row of ``tokens`` (indices not counted).

        ``dtype=None`` means ``precision.cache``.
        """
        raise NotImplementedError(f"{type(self).__name__}.cache_bytes")


class Layer(nnx.Module):
    """Base of all attention layers.

    ``__call__`` is the training pass. ``prefill`` takes any T >= 1 and may be called repeatedly;
    ``decode`` takes 1 to 8 tokens and by default is ``prefill``.
    """

    config: Any

    def __call__(
        self, x: jax.Array, seq: Seq, *, impl: Any = None, rng=None, state=None, shared=None
    ) -> Out:
        raise NotImplementedError(f"{type(self).__name__}.__call__")

    def init_state(self) -> Any:
        """The explicit state before the first step (arrays), None for a layer without one.

        A layer with state gets ``state=`` in every mode and returns the next one in ``Out.state``;
        no gradient flows through it.
        """
        return None

    def init_cache(self, batch: int, capacity: int, dtype: Any = None, *, policy=None) -> Any:
        raise UnsupportedError(
            f"{type(self).__name__}.init_cache", "this variant has no decode cache",
            "use a variant whose config declares decode = True",
        )

    def prefill(self, x: jax.Array, seq: Seq, cache: Any, *, impl: Any = None) -> Out:
        raise UnsupportedError(
            f"{type(self).__name__}.prefill", "this variant has no decode cache",
            "use a variant whose config declares decode = True",
        )

    def decode(self, x: jax.Array, seq: Seq, cache: Any, *, impl: Any = None, **more: Any) -> Out:
        self.check_decode(x)
        return self.prefill(x, seq, cache, impl=impl, **more)  # more: state and shared, if declared

    def check(self, x: jax.Array, seq: Seq, cache: Any = None) -> None:
        """Raise ShapeError unless ``x`` is ``[B, T, D]`` and ``seq`` and ``cache`` fit it."""
        dim = self.config.dim
        if x.ndim != 3 or x.shape[-1] != dim or x.shape[1] < 1:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}",
                f"must be [B, T, D] with T >= 1 and D = {dim}",
                "pass activations, not token ids, of the config's dim",
            )
        seq.check(x.shape[0], x.shape[1])
        if cache is not None:
            cache.check_batch(x.shape[0])

    def check_decode(self, x: jax.Array) -> None:
        if x.ndim == 3 and not 1 <= x.shape[1] <= MAX_DECODE:
            raise ShapeError(
                f"decode got T = {x.shape[1]} tokens",
                f"takes 1 to {MAX_DECODE}",
                "call prefill for longer chunks",
            )


def refuse_policy(config: LayerConfig, policy: Any) -> None:
    """Raise unless ``policy`` is None: this cache has no quantised, evicting or paged form."""
    if policy is not None:
        raise UnsupportedError(
            f"{type(config).__name__}.init_cache(policy={policy!r})",
            "this variant has only the plain cache",
            "pass policy=None",
        )
