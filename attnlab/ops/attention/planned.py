"""A mask turned once per step into block lists that all layers and the backward pass reuse.

Kernels that read block lists build them in every call. ``plan`` builds them beforehand, outside the
stack of layers, and the result goes through ``mask=`` like any mask::

    mask = plan(Causal(), positions=seq.positions, segments=seq.segments, layout=seq.layout,
                batch=B, heads=N, block_q=128, block_k=128)
    for layer in layers:
        o = attention(q, k, v, mask=mask, positions=seq.positions, segments=seq.segments, ...)

On a mesh every device builds those of its rows. Inside a model nobody calls it: a stack of layers
plans ahead (``ahead``).

The lists speak of the positions and segments they were made from: a call with others is wrong, and
only its shapes can be checked. Implementations that read no lists see the mask inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from attnlab.core import axes
from attnlab.core.errors import ConfigError, ShapeError
from attnlab.core.mask import STATIC, Coords, Mask, Wrapped
from attnlab.core.types import Layout
from attnlab.ops.attention.blocks import BlockLists, block_lists, on_host
from attnlab.ops.attention.inputs import composed, coordinate_specs, coordinates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planned(Wrapped):
    """``inner`` with its block lists.

    Args:
        inner: the whole mask (segments and sink tokens included), bound to its rows and heads.
        lists: forward and transposed lists of every pair of block sizes.
        T, S, layout: of the calls it is made for.
    """

    inner: Mask
    lists: tuple[BlockLists, ...]
    T: int = dataclasses.field(metadata=STATIC)
    S: int = dataclasses.field(metadata=STATIC)
    layout: str = dataclasses.field(metadata=STATIC)

    def bound(self, B, N):
        return dataclasses.replace(self, inner=self.inner.bound(B, N))

    def check(self, B, N, T):
        self.inner.check(B, N, T)
        for lists in self.lists:
            rows, heads = lists.full.start.shape[:2]
            if rows not in (1, B) or heads not in (1, N):
                raise ShapeError(
                    f"the mask is planned for {rows} rows and {heads} heads",
                    f"the call has B = {B} and N = {N}", "plan it for the call's batch and heads",
                )

    def check_call(self, T: int, S: int, layout: str) -> None:
        """Raise ShapeError or ConfigError where it is planned for other tokens."""
        if (T, S) != (self.T, self.S):
            raise ShapeError(
                f"the mask is planned for T = {self.T} and S = {self.S}",
                f"the call has T = {T} and S = {S}", "plan it for the call's tokens",
            )
        if layout != self.layout:
            raise ConfigError(
                f"the mask is planned for layout = {self.layout!r}",
                f"the call has layout = {layout!r}",
                "give plan() the positions, segments and layout of the call",
            )

    def specs(self, batch, heads):
        def part(x):
            cut = (batch if x.shape[0] > 1 else None, heads if x.shape[1] > 1 else None)
            return P(*cut)

        return dataclasses.replace(
            self, inner=self.inner.specs(batch, heads), lists=jax.tree.map(part, self.lists)
        )

    def find(self, block_q, block_k, layout, transposed) -> BlockLists | None:
        for lists in self.lists:
            same = (lists.block_q, lists.block_k) == (block_q, block_k)
            if same and lists.transposed == transposed and layout == self.layout:
                return lists
        return None


def plan(
    mask: Mask | Callable[..., Any] | None = None,
    *,
    batch: int,
    heads: int,
    positions: Any = None,
    segments: Any = None,
    length: int | None = None,
    layout: Layout = "any",
    sink_tokens: int = 0,
    block_q: int = 128,
    block_k: int = 128,
) -> Planned:
    """The mask of calls with these arguments, with its forward and transposed block lists.

    Args:
        mask, positions, segments, layout, sink_tokens: as in ``attention``. A ``Planned`` mask of
            the same arguments gets the lists of one more pair of block sizes.
        batch, heads: B and N of the calls. length: T = S of calls without positions.
        block_q, block_k: tokens of a tile; those of the kernel (others are built as before).

    Raises:
        ShapeError, ConfigError: as ``attention`` does; ConfigError also where neither positions
            nor length is given, and for ``Blocks`` whose blocks the tiles do not divide.
    """
    if block_q < 1 or block_k < 1:
        raise ConfigError(
            f"block_q = {block_q}, block_k = {block_k}", "count the tokens of a tile", "use 128"
        )
    if (positions is None) == (length is None):
        raise ConfigError(
            f"positions {'=' if positions is None else 'and length ='} "
            f"{'None and length = None' if length is None else length}",
            "the lists need the number of tokens, once",
            "pass positions=, or length= for calls without positions",
        )
    sides = positions if isinstance(positions, tuple) else (positions, positions)
    T, S = (length, length) if length is not None else (x.shape[-1] for x in sides)
    before = mask if isinstance(mask, Planned) else None
    whole = composed(mask, sink_tokens, segments is not None)
    q, k, layout = coordinates(positions, segments, layout, batch, T, S)
    if before is not None:
        before.check_call(T, S, layout)
        whole = before.inner
    whole.check(batch, heads, T)
    whole = whole.bound(batch, heads)

    def build(whole: Mask, q: Coords, k: Coords) -> tuple[BlockLists, ...]:
        return tuple(
            block_lists(
                whole, q, k, block_q=block_q, block_k=block_k, layout=layout, transposed=transposed
            ).with_table()
            for transposed in (False, True)
        )

    if axes.mesh_to_cut() is not None and not on_host(whole, layout):
        build = _over_rows(build, batch, heads)
    old = () if before is None else before.lists
    return Planned(whole, old + build(whole, q, k), T, S, layout)


def _over_rows(build, B: int, N: int):
    """``build`` on each device's rows and heads, like the kernels: XLA would gather them all."""
    batch, heads = axes.cut("batch", B), axes.cut("heads", N)

    def cut(lists: BlockLists) -> BlockLists:
        rows, columns = lists.full.start.shape[:2]  # of every array
        spec = P(batch if rows > 1 else None, heads if columns > 1 else None)
        return jax.tree.map(lambda _: spec, lists)

    def mapped(whole: Mask, q: Coords, k: Coords):
        shapes = jax.eval_shape(build, whole, q, k)
        coords = (coordinate_specs(x, batch) for x in (q, k))
        return jax.shard_map(
            build, mesh=axes.mesh_to_cut(), in_specs=(whole.specs(batch, heads), *coords),
            out_specs=tuple(map(cut, shapes)), check_vma=False,
        )(whole, q, k)

    return mapped
