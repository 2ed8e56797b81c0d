"""The gated short convolution in front of a mixer."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from attnlab.core.axes import WIDTH, constrain, normal, ones, parameter
from attnlab.core.cache import compact, refuse_truncate
from attnlab.core.errors import ShapeError
from attnlab.core.linear import project
from attnlab.core.types import Precision, Seq
from attnlab.ops.conv import ConvState, causal_conv, init_state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvCache:
    """The cache of a mixer behind a short convolution.

    Args:
        mixer: the mixer's own. rows ``[B, k - 1, D]``, segments int32 ``[B, k - 1]``: the last
            tokens that the convolution read (``ops.conv.ConvState``).
    """

    mixer: Any
    rows: jax.Array
    segments: jax.Array

    AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "rows": ("batch", None, "width"), "segments": ("batch", None),
    }

    def truncate(self, length):
        raise refuse_truncate(type(self).__name__)


class ShortConv(nnx.Module):
    """``y = x + conv(x) * (x W + b)``, conv causal and depthwise over ``taps`` tokens.

    The shift that lets one layer look at "the token before", which tasks of recall need (Arora et
    al. 2023, arXiv 2312.04927, as BaseConv; Based, arXiv 2402.18668). It stays inside a document. b
    starts at one: with the shift there from the first step one layer learned induction within 400
    steps for all rates and seeds tried, with b at nothing for none.
    """

    def __init__(self, dim: int, taps: int, precision: Precision, rngs: nnx.Rngs):
        self.precision = precision
        dtype = precision.params
        self.w_conv = parameter(rngs, normal(taps**-0.5), (taps, dim), (None, "embed"), dtype)
        self.w_gate = parameter(rngs, normal(dim**-0.5), (dim, dim), ("embed", None), dtype)
        self.b_gate = parameter(rngs, ones, (dim,), ("embed",), dtype)

    def __call__(
        self, x: jax.Array, seq: Seq, state: ConvState | None = None
    ) -> tuple[jax.Array, ConvState]:
        """``y[B, T, D]`` and the state after it; ``state`` None: of a whole sequence."""
        x = constrain(x.astype(self.precision.compute), *WIDTH)
        gate = project("btd,de->bte", x, self.w_gate[...], WIDTH, WIDTH, self.precision.softmax)
        moved, inner, back = compact(x, seq)
        y, state = causal_conv(moved, self.w_conv[...], segments=inner.segments, state=state)
        return x + back(y) * (gate + self.b_gate[...].astype(gate.dtype)), state

    def init_state(self, batch: int, dtype: Any) -> ConvState:
        """The state before the first token."""
        taps, dim = self.w_conv.shape
        return init_state(batch, taps, dim, jnp.dtype(dtype))


def with_state(mixer: Any, state: ConvState, old: ConvCache) -> ConvCache:
    """The cache of the next pass, in the dtypes of this one."""
    return ConvCache(mixer, state.rows.astype(old.rows.dtype), state.segments)


def state_of(cache: Any) -> ConvState:
    """What the convolution reads of a cache."""
    if not isinstance(cache, ConvCache):
        raise ShapeError(
            f"cache is a {type(cache).__name__}", "this decoder has short convolutions",
            "use the caches of its init_caches",
        )
    return ConvState(cache.rows, cache.segments)


def conv_flops(tokens: int, dim: int) -> float:
    """Forward FLOPs of ``ShortConv``: of its gate; the convolution is elementwise, like a norm."""
    return 2.0 * tokens * dim**2


def conv_params(dim: int, taps: int) -> int:
    return taps * dim + dim**2 + dim
