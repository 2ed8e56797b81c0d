"""Sizes of the Hopper kernels: heuristic, candidates, limits, and the choice for a call.

Names of the sizes: ``block_q``, ``block_k`` (tokens of a tile of the block lists) and ``stages``
(tiles in flight) of the forward; the same with ``_dq`` and ``_dkv`` for the two backward kernels.
Besides (``persistent``: see ``gpu_work``)

| name | 0 | otherwise |
|---|---|---|
| ``persistent``, also ``_dq``, ``_dkv`` | a block a row | 1 or 2: rows that a block has room for |
| ``section``, also ``_dq``, ``_dkv`` | as many heads as L2 holds | so many heads, see ``order`` |
| ``turns_dq``, ``turns_dkv`` | two warpgroups run as they come | 1: they take turns to multiply |
| ``wide_dq`` | ``gpu_backward`` | ``gpu_backward_wide``, so many tiles of values in flight |
| ``wide_dkv`` | ``gpu_backward`` | 1: ``gpu_backward_wide_kv`` |
| ``fused_dkv`` | dq has a kernel of its own | 1: ``gpu_backward_fused``; sizes of dq mean nothing |

The heuristic takes ``gpu_backward_fused`` where it serves and there are heads enough; a key does
not tell how many there are, so candidates start from the kernels that serve all. Forcing a size
that it lacks (any of dq) is asking for these.

Heads above 256 have no choice: ``gpu_widths``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

from attnlab.core.errors import ConfigError
from attnlab.core.mask import Mask
from attnlab.core.staging import Body
from attnlab.ops.attention import tuning

# The fields of a kernel's Config that are chosen, by the ending of their names, 0 unless said
# otherwise: a new one is a word here.
FIELDS = {
    "": ("block_q", "block_k", "stages", "persistent", "section"),
    "_dq": ("block_q", "block_k", "stages", "turns", "wide", "persistent", "section"),
    "_dkv": ("block_q", "block_k", "stages", "turns", "wide", "persistent", "section", "fused"),
}
MOST = {"turns": 1, "wide_dkv": 1, "persistent": 2, "fused": 1}
LACKS = {  # what these kernels do not have
    "wide": ("turns_dkv", "persistent_dkv"), "fused": ("turns_dkv", "persistent_dkv", "wide_dkv"),
}
ENDS = {"forward": ("",), "backward": ("_dq", "_dkv")}
FEWEST = 8  # heads of all rows of the batch for one fused kernel: their rows wait for each other
ROWS = 128  # of the side that a block owns: two warpgroups of 64
KB = 1024
SHARED_KB = 226  # 227 a block, and barriers take less than one
SCRATCH_KB = 2  # sums along a row of a tile, in the kernels of narrow heads


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
    """The sizes of a call, each chosen once. The block lists of a plan ask here as kernels do.

    Args:
        key: of the forward. heads: of all rows of the batch. score: the modified score split
            (``core.staging``), or None. dense: whether score or mask has a value by query and key.
            value_is_prefix: see ``gpu_wide``.
    """

    key: tuning.Key
    heads: int
    score: Body | None
    dense: bool
    value_is_prefix: bool = False

    @staticmethod
    def of(
        q, v, mask: Mask, layout: str, score: Body | None, dense: bool,
        value_is_prefix: bool = False,
    ) -> Sizes:
        """Of a call with arrays ``q[B, T, N, H]``, ``v[B, S, K, V]``; other arguments as above.

        Tuned rows are of calls whose positions are the places in the array. Others (packed
        documents, rows, parts of a ring) read them beside every tile: their class is ``other``.
        """
        (B, T, N, H), (S, K, V) = q.shape, v.shape[1:]
        kind = tuning.mask_class(mask) if layout == "full" else "other"
        H, V = whole_widths(H, V)
        key = tuning.Key("gpu", "forward", H, V, N // K, q.dtype.name, T, S, kind)
        return Sizes(key, B * N, score, dense, value_is_prefix)

    @functools.cached_property
    def forward(self) -> Any:
        """The Config of the forward kernel."""
        from attnlab.ops.attention import gpu_widths
        from attnlab.ops.attention.gpu_forward import Config

        H, V = self.key.H, self.key.V
        if max(H, V) > 256:
            return gpu_widths.forward_config(H, V, self.value_is_prefix)
        return Config(**_fields("", self._blocks("forward")))

    @functools.cached_property
    def backward(self) -> tuple[Any, Any]:
        """The Configs of the kernels for dq and for dk, dv, of heads to 256."""
        from attnlab.ops.attention import gpu_backward, gpu_backward_fused, gpu_backward_wide

        blocks, configs = self._blocks("backward"), []
        if blocks["fused_dkv"]:
            if self.score is not None or self.dense:
                raise ConfigError(
                    "fused_dkv = 1", "serves calls without score function and bias", "force 0"
                )
            sizes = {n: blocks[f"{n}_dkv"] for n in ("block_q", "block_k", "stages", "section")}
            fused = gpu_backward_fused.Config(**sizes)
            return fused, fused
        for end in ENDS["backward"]:
            fields = _fields(end, blocks)
            wide = fields.pop("wide")
            fields.pop("fused", None)
            if not wide:
                configs.append(gpu_backward.Config(**fields))
                continue
            fields = {n: x for n, x in fields.items() if n + end not in LACKS["wide"]}
            fields |= {"stages_v": wide} if end == "_dq" else {}
            configs.append(gpu_backward_wide.Config(**fields))
        return configs[0], configs[1]

    def _blocks(self, direction: tuning.Direction) -> tuning.Blocks:
        key = dataclasses.replace(self.key, direction=direction)
        # Tuned rows are of plain calls of many heads, and a key does not tell others from them.
        plain = self.score is None and not self.dense
        may_fuse = plain and direction == "backward" and _may_fuse(self.heads, tuning.forced())
        default = heuristic(key, self.score, self.dense)
        if may_fuse:
            default |= _fused(key) or {}

        def serves(blocks: tuning.Blocks) -> bool:
            return plain and (may_fuse or not blocks.get("fused_dkv"))

        return tuning.choose(key, default=default, serves=serves).blocks


def whole_widths(H: int, V: int) -> tuple[int, int]:
    """Widths in the kernels: whole tiles of shared memory."""
    H = -(-H // 64) * 64
    unit = 64 if max(H, V) <= 256 else 128
    return H, -(-V // unit) * unit


def _fields(end: str, blocks: tuning.Blocks) -> dict[str, Any]:
    """Fields of the Config of a kernel, and ``wide``."""
    fields: dict[str, Any] = {field: blocks[field + end] for field in FIELDS[end]}
    return {n: bool(x) if n == "turns" else x for n, x in fields.items()}


def _named(end: str, block_q: int, block_k: int, stages: int, **more: int) -> tuning.Blocks:
    given = dict(block_q=block_q, block_k=block_k, stages=stages, **more)
    return {field + end: given.get(field, 0) for field in FIELDS[end]}


def heuristic(
    key: tuning.Key, score: Body | None = None, dense: bool = False
) -> tuning.Blocks:
    """Sizes by measurement on an H200. score, dense: see ``Sizes``.

    Rows of a causal or full mask are long: what a block waits for at its start is little, and
    persistent blocks are slower for it (up to 4 %). With other masks they gain 6 to 10 %.
    """
    H, V = whole_widths(key.H, key.V)
    light, plain = key.mask in ("full", "causal"), score is None and not dense
    if key.direction == "forward":
        return _forward(H, V, dense, 2 if plain and not light else 0)
    return _backward(H, V, light, plain, score)


def _forward(H: int, V: int, dense: bool, persistent: int) -> tuning.Blocks:
    if max(H, V) > 192 or V > 128:
        return _named("", ROWS, 64, 2)
    if dense and max(H, V) > 64:  # values by query and key are held beside the logits
        return _named("", ROWS, 64, 4)
    if max(H, V) > 128:  # what two rows own does not fit
        return _named("", ROWS, 128, 2)
    return _named("", ROWS, 128, 4 if max(H, V) <= 64 else 2, persistent=persistent)


def _backward(H: int, V: int, light: bool, plain: bool, score: Body | None) -> tuning.Blocks:
    """With a score function both kernels are short of registers: smaller tiles, and turns only
    where it reads coordinates. With values by query and key in the mask both have the sizes of a
    score function; that was not measured."""

    def dq(block_k: int, stages: int, turns: int = 0, wide: int = 0, persistent: int = 0):
        return _named(
            "_dq", ROWS, block_k, stages, turns=turns, wide=wide, persistent=persistent
        )

    def dkv(block_q: int, stages: int, turns: int = 0, wide: int = 0, persistent: int = 0):
        return _named(
            "_dkv", block_q, ROWS, stages, turns=turns, wide=wide, persistent=persistent
        )

    if only_wide(H, V):
        if max(H, V) > 192:
            return dq(64, 2, wide=1 if V > 192 else 2) | dkv(64, 2, wide=1)
        return dq(64, 2, turns=1, wide=2) | dkv(64, 3, wide=1)
    if max(H, V) > 128:
        return dq(64, 2) | dkv(64, 2, wide=1)
    if plain and not light:
        return dq(64, 2, persistent=2) | dkv(64, 2, persistent=2)
    if max(H, V) <= 64:
        return dq(128, 2) | dkv(128, 2, turns=1) if plain else dq(64, 3) | dkv(64, 3)
    places = score is None or bool(
        (score.coordinates - {"score"}) | score.floats | set(score.handed)
    )
    if plain or places:
        return dq(64, 3) | dkv(64, 3, turns=1)
    return dq(128, 2) | dkv(64, 3)


def _may_fuse(heads: int, forced: tuning.Blocks) -> bool:
    """Whether it is forced, or there are heads enough and no forced size is of another kernel."""
    lacks = any(forced.get(name) for name in LACKS["fused"]) or forced.get("block_q_dkv") == ROWS
    dq = any(name.endswith("_dq") for name in forced)
    return bool(forced.get("fused_dkv", heads >= FEWEST and not lacks and not dq))


def _fused(key: tuning.Key) -> tuning.Blocks | None:
    """The sizes of the kernel that has dq, dk and dv, where it serves."""
    H, V = whole_widths(key.H, key.V)
    serves = H == V <= 128 and key.mask in ("full", "causal")
    return _named("_dkv", 64, ROWS, 2, fused=1) if serves else None


def only_wide(H: int, V: int) -> bool:
    """Whether the kernels of narrow heads were not made for these widths."""
    return H > 192 or V > 128


# Of each kernel: rows beside its own 128, stages, turns, wide. All compile, most without spilling;
# the heuristic spills up to 0.3 KB (dq at 128) and 0.8 KB (dk, dv at 192 / 128), these 1.2 KB.
_TRIED = {
    "": ((128, 2), (128, 3), (128, 4), (64, 2), (64, 3), (64, 4)),
    "_dq": (
        (64, 2, 0, 0), (64, 3, 0, 0), (64, 3, 1, 0), (128, 2, 0, 0), (64, 2, 0, 1), (64, 3, 0, 2)
    ),
    "_dkv": (
        (64, 2, 0, 0), (64, 3, 0, 0), (64, 3, 1, 0), (128, 2, 0, 0), (128, 2, 1, 0), (64, 3, 0, 1),
        (128, 2, 0, 1),
    ),
}
_TRIED_WIDE = {
    "_dq": ((64, 2, 0, 0), (64, 2, 1, 1), (64, 2, 1, 2)), "_dkv": ((64, 2, 0, 1),)
}


def _candidates(key: tuning.Key) -> list[tuning.Blocks]:
    """The heuristic, and it with sizes of one kernel changed, or with persistent blocks."""
    usual = heuristic(key)
    found, wide = [usual], only_wide(*whole_widths(key.H, key.V))
    for end in ENDS[key.direction]:
        tried = _TRIED[end]
        if wide and end:
            tried = (*(x for x in tried if x[3]), *_TRIED_WIDE[end])
        for other, stages, *rest in tried:
            rows = (other, ROWS) if end == "_dkv" else (ROWS, other)
            sizes = _named(end, *rows, stages, **dict(zip(("turns", "wide"), rest)))
            found.append(usual | sizes)
        found += [usual | {f"persistent{end}": p} for p in (0, 1, 2)]
        fused = _fused(key) if end == "_dkv" else None
        found += [usual | fused] if fused else []
    return [
        blocks for i, blocks in enumerate(found)
        if blocks not in found[:i] and _refuses(key, blocks) is None
    ]


def _refuses(key: tuning.Key, blocks: tuning.Blocks) -> str | None:
    return next((reason for refused, reason in _limits(key, blocks) if refused), None)


def _limits(key: tuning.Key, blocks: tuning.Blocks) -> Iterator[tuple[bool, str]]:
    H, V = whole_widths(key.H, key.V)
    names = [field + end for end in ENDS[key.direction] for field in FIELDS[end]]
    yield set(names) != set(blocks), f"the sizes are not {', '.join(names)}"
    for end in ENDS[key.direction]:
        sizes = {field: blocks[field + end] for field in FIELDS[end]}
        own, other = ("block_k", "block_q") if end == "_dkv" else ("block_q", "block_k")
        yield sizes[own] != ROWS, (
            f"{own}{end} = {sizes[own]} is not the {ROWS} rows of two warpgroups"
        )
        yield sizes[other] not in (64, 128), f"{other}{end} = {sizes[other]} is not 64 or 128"
        yield sizes["stages"] < 2, f"stages{end} = {sizes['stages']} leaves no tile in flight"
        for field, size in sizes.items():
            most = MOST.get(field + end, MOST.get(field, math.inf))
            yield not 0 <= size <= most, f"{field}{end} = {size} is not from 0 to {most}"
            for kernel, lacks in LACKS.items():
                yield bool(size and sizes.get(kernel) and field + end in lacks), (
                    f"{field}{end} = {size}: the kernel of {kernel}{end} has no such thing"
                )
        if sizes.get("fused"):
            yield key.mask not in ("full", "causal"), (
                f"fused{end} = 1 serves plain causal and full masks in layout full, not {key.mask}"
            )
            yield H != V or H > 128 or sizes["block_q"] != 64, (
                f"fused{end} = 1 serves H = V up to 128 and block_q{end} = 64"
            )
        room = _shared_kb(end, sizes, H, V)
        yield room > SHARED_KB, (
            f"{'forward' if not end else end[1:]}: the tiles of H = {H}, V = {V} take {room} KB of "
            f"shared memory, there are {SHARED_KB}"
        )
        if not end or (end == "_dkv" and sizes["wide"]):
            continue
        # A thread holds accumulators and the tiles beside them. Where they are more the compiler
        # spills 2 to 4 KB: most of a tile would pass through memory.
        held, most = (H // 2, 192) if end == "_dq" else ((H + V) // 2, 224)
        held += sizes[other]
        yield held > most, (
            f"{other}{end} = {sizes[other]} with H = {H}, V = {V}: accumulators and tiles take "
            f"{held} registers of a thread, there are {most} for them"
        )


def _shared_kb(end: str, sizes: dict[str, int], H: int, V: int) -> int:
    """What the kernel allocates but for its barriers, each array in whole KB; 2 bytes a number."""
    other, stages = sizes["block_q" if end == "_dkv" else "block_k"], sizes["stages"]
    wide = sizes.get("wide", 0)
    rings = [2 * stages * other * H, 2 * (wide if end == "_dq" and wide else stages) * other * V]
    owned = 2 * max(1, sizes["persistent"])
    if end == "":  # o takes the place of q; lse
        unit = math.lcm(8 * H, 8 * V)
        arrays = [2 * owned * (-(-64 * max(H, V) // unit) * unit), 4 * ROWS]
    elif end == "_dq":
        arrays = [owned * ROWS * H, owned * ROWS * V]
    elif sizes["fused"]:  # lse and delta together; ds and dq of two tiles; a copy of k
        arrays = [owned * ROWS * H, owned * ROWS * V, 8 * stages * other]
        arrays += [owned * ROWS * H] if H == 64 else []
        arrays += [4 * ROWS * other, 8 * other * H]
    else:  # a block of the kernel of wide heads owns half of the rows; lse and delta
        own = 64 if wide else ROWS
        arrays = [owned * own * H, owned * own * V, *[4 * stages * other] * 2]
        arrays += [4 * 64 * other] if wide else []
    fused = sizes.get("fused", 0)
    queue = min(1, sizes["persistent"]) or fused
    scratch = 0 if wide or fused else SCRATCH_KB
    return sum(-(-size // KB) for size in (*rings, *arrays)) + scratch + queue


def _tile(role: str, blocks: tuning.Blocks) -> tuning.Tile:
    end = {"forward": "", "dq": "_dq", "dkv": "_dkv"}[role]
    return tuning.Tile(blocks[f"block_q{end}"], blocks[f"block_k{end}"])


tuning.register("gpu", tuning.Space(
    heuristic, _candidates, _refuses, _tile, across_masks=False, modified=False
))
