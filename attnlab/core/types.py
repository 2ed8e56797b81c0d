"""The types every layer speaks: ``Seq`` in, ``Out`` back, ``Precision`` beside them.

Legend used everywhere: ``B`` batch, ``T`` query tokens, ``S`` key tokens, ``N`` query heads, ``K``
key/value heads, ``G = N/K``, ``H`` head width, ``V`` value width, ``D`` model width, ``R`` latent
width, ``P`` rotary width, ``C`` chunk, ``L`` layers, ``E`` experts. Layout is always ``B T N H``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnlab.core.errors import ConfigError, ShapeError
from attnlab.core.mask import Mask, same

Layout = Literal["full", "packed", "any"]
LAYOUTS: tuple[str, ...] = ("full", "packed", "any")


@dataclasses.dataclass(frozen=True)
class Plans:
    """Masks planned for the tokens of one ``Seq`` (``ops.attention.ahead``).

    Args:
        positions, segments: of these tokens, the very arrays.
        masks: ``(mask, planned)`` each, the mask as a layer names it, and with its block lists.
        heads: N of each.
    """

    positions: Any
    segments: Any
    masks: tuple[tuple[Mask, Mask], ...]
    heads: tuple[int, ...]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Seq:
    """Where each token of a batch stands.

    Args:
        positions: int32 ``[B, T]``, the position of a token inside its document.
        segments: int32 ``[B, T]`` or None. Tokens see each other only inside one segment; segment 0
            is padding; None means one document and no padding.
        layout: a static promise that lets kernels skip work without looking at the values:
            ``"full"``: one document a row, positions ``0..T-1``, no segments;
            ``"packed"``: documents laid end to end, positions restart at 0 with each, padding only
            at the end; ``"any"``: nothing is promised.
        plans: what a stack of layers has planned for these tokens, see ``planned``.

    Variants with convolutions or shifts (CCA) take the token before in a segment from the order of
    the array, so the tokens of a segment must stand together there, in ascending position, and a
    cached row goes on with its last segment or starts a new one. Padding may hold any finite
    numbers.
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None = None
    layout: Layout = "any"
    plans: Plans | None = None

    @staticmethod
    def full(batch: int, length: int) -> Seq:
        """One document a row at positions ``0..length-1``."""
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return Seq(positions, None, "full")

    def check(self, batch: int, length: int) -> None:
        """Raise ShapeError unless this describes ``batch`` rows of ``length`` tokens."""
        for name in ("positions", "segments"):
            value = getattr(self, name)
            if value is not None and value.shape != (batch, length):
                raise ShapeError(
                    f"seq.{name} has shape {tuple(value.shape)}",
                    f"must be [B, T] = ({batch}, {length}) like the tokens",
                    "build it with Seq.full(B, T) or pass one position and segment a token",
                )
        if self.layout not in LAYOUTS or (self.layout == "packed") > (self.segments is not None):
            raise ConfigError(
                f"seq.layout = {self.layout!r} with segments = "
                f"{'None' if self.segments is None else 'an array'}",
                f"is one of {', '.join(LAYOUTS)}; packed documents have segments",
                'pass the segments, or layout="any"',
            )

    def planned(self, mask: Mask, heads: int) -> Mask:
        """``mask`` with the block lists planned for ``heads`` heads; as it is where there are none.

        Raises ConfigError where the plans are those of other tokens.
        """
        plans = self.plans
        if plans is None:
            return mask
        self._check_plans(plans)
        for (named, found), N in zip(plans.masks, plans.heads, strict=True):
            if N == heads and same(named, mask):
                return found
        return mask

    def keywords(self, mask: Mask, heads: int) -> dict[str, Any]:
        """What ``attention`` is told of these tokens: the planned ``mask`` and where they stand."""
        return dict(
            mask=self.planned(mask, heads), positions=self.positions, segments=self.segments,
            layout=self.layout,
        )

    def with_plan(self, mask: Mask, heads: int, planned: Mask) -> Seq:
        """This, with ``planned`` as the answer of ``self.planned(mask, heads)``.

        Raises ConfigError where it has plans of other tokens.
        """
        kept = []
        if self.plans is not None:
            self._check_plans(self.plans)
            kept = [
                (pair, N) for pair, N in zip(self.plans.masks, self.plans.heads, strict=True)
                if N != heads or not same(pair[0], mask)
            ]
        masks, numbers = zip(*kept, ((mask, planned), heads))
        plans = Plans(self.positions, self.segments, masks, numbers)
        return dataclasses.replace(self, plans=plans)

    def _own(self, plans: Plans) -> bool:
        return plans.positions is self.positions and plans.segments is self.segments

    def _check_plans(self, plans: Plans) -> None:
        if not self._own(plans):
            raise ConfigError(
                "seq.plans of other positions or segments", "block lists speak of their tokens",
                "drop them with dataclasses.replace(seq, plans=None), or plan for these tokens",
            )

    # Transformations of jax give every leaf another array. Plans of this very Seq stay its own,
    # others stay foreign: their tokens are no leaves, and None is not what the Seq holds.

    def tree_flatten_with_keys(self):
        key, plans = jax.tree_util.GetAttrKey, self.plans
        masks, heads, own = (), (), True
        if plans is not None:
            masks, heads, own = plans.masks, plans.heads, self._own(plans)
        leaves = ("positions", self.positions), ("segments", self.segments), ("plans", masks)
        return tuple((key(name), x) for name, x in leaves), (self.layout, heads, own)

    @classmethod
    def tree_unflatten(cls, static, leaves):
        (layout, heads, own), (positions, segments, masks) = static, leaves
        tokens = (positions, segments) if own else (None, None)
        plans = Plans(*tokens, masks, heads) if heads else None
        return cls(positions, segments, layout, plans)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Out:
    """What a layer returns, the same type in every mode.

    Args:
        y: ``[B, T, D]``.
        cache: the updated cache after prefill and decode, None in training.
        aux: named fp32 scalars (router loss, entropy, ...) or None.
        state: explicit non-gradient pytree carried between steps (EMA, k-means), or None.
        shared: what the layer's config ``writes`` for later layers of the stack, or None.
    """

    y: Float[Array, "B T D"]
    cache: Any = None
    aux: dict[str, jax.Array] | None = None
    state: Any = None
    shared: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Four dtypes, by name. Softmax, log-sum-exp and cross-device partial sums use ``softmax``.

    Args:
        params: stored parameters. compute: matmul inputs and activations.
        softmax: accumulators, softmax, norms, rotary angles; float32 or float64.
        cache: cached keys, values and states.
    """

    params: str = "float32"
    compute: str = "float32"
    softmax: str = "float32"
    cache: str = "float32"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name = getattr(self, field.name)
            try:
                ok = jnp.issubdtype(jnp.dtype(name), jnp.floating)
            except TypeError:
                ok = False
            if not ok:
                raise ConfigError(
                    f"precision.{field.name} = {name!r}",
                    "must name a floating dtype",
                    'use "float32", "bfloat16" or "float64"',
                )
        if self.softmax not in ("float32", "float64"):
            raise ConfigError(
                f"precision.softmax = {self.softmax!r}",
                "softmax and partial sums are never below float32",
                'use "float32"',
            )

    @staticmethod
    def named(name: str) -> Precision:
        """``"float32"``, ``"float64"``, or ``"bfloat16"`` (fp32 parameters, bf16 compute)."""
        if name == "bfloat16":
            return Precision(compute="bfloat16", cache="bfloat16")
        if name == "float64":
            return Precision(params=name, compute=name, softmax=name, cache=name)
        if name == "float32":
            return Precision()
        raise ConfigError(
            f"precision = {name!r}", "unknown", 'use "float32", "bfloat16" or "float64"'
        )
