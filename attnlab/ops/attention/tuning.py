"""Block sizes of the attention kernels: forced, tuned for this device, or an explicit heuristic.

An implementation registers a ``Space``: its heuristic, its candidates and what its blocks mean. It
asks ``choose(key)`` when it is traced. Tuned rows live in ``attnlab/data/tuned/<device>.json``,
written by ``attnlab tune``; every row says whether its time was predicted or measured. A row serves
its own implementation, direction, widths and dtype; among those the nearest power-of-two lengths,
group and mask class win, at most ``REACH`` steps away.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from attnlab.core.dispatch import Device
from attnlab.core.errors import ConfigError
from attnlab.core.mask import Mask, plain

Blocks = dict[str, int]
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
REACH = 4.0  # a row further away than this many doublings of T, S, G is not used
OTHER_MASK = 1.5  # another mask class counts as so many doublings


@dataclasses.dataclass(frozen=True)
class Key:
    """What block sizes are chosen by.

    Args:
        implementation, direction: whose blocks, for which pass. H, V: widths. G: query heads a
            key/value head. dtype: of q, k, v. T, S: lengths in tokens. mask: its class, see
            ``mask_class``.
    """

    implementation: str
    direction: Direction
    H: int
    V: int
    G: int
    dtype: str
    T: int
    S: int
    mask: str

    @staticmethod
    def of(implementation: str, direction: Direction, q, k, v, mask: Mask) -> Key:
        """The key of a call with arrays ``q[B, T, N, H]``, ``k[B, S, K, H]``, ``v[B, S, K, V]``."""
        T, N, H = q.shape[1:]
        S, K, V = v.shape[1:]
        return Key(
            implementation, direction, H, V, N // K, q.dtype.name, T, S, mask_class(mask)
        )

    @staticmethod
    def of_call(implementation: str, direction: Direction, call: Any) -> Key:
        """The key of a call of which only the facts are known (``ops.attention.Call``)."""
        return Key(
            implementation, direction, call.H, call.V, call.N // call.K, call.dtype, call.T,
            call.S, mask_class(call.mask),
        )

    def bucket(self) -> Key:
        """This key with G, T and S rounded to the nearest power of two."""
        return dataclasses.replace(self, G=_power(self.G), T=_power(self.T), S=_power(self.S))

    def distance(self, other: Key) -> float:
        """Doublings between two keys, infinite where they may not share blocks."""
        for name in ("implementation", "direction", "H", "V", "dtype"):
            if getattr(self, name) != getattr(other, name):
                return math.inf
        steps = [abs(math.log2(getattr(self, n) / getattr(other, n))) for n in ("G", "T", "S")]
        return sum(steps) + (OTHER_MASK if self.mask != other.mask else 0.0)


def mask_class(mask: Mask) -> str:
    """``full``, ``causal``, ``window`` (segments aside), or ``other``."""
    kind = plain(mask)
    if kind is None:
        return "other"
    causal, window = kind
    return "window" if window is not None else "causal" if causal else "full"


def _power(n: int) -> int:
    return 2 ** round(math.log2(n))


@dataclasses.dataclass(frozen=True)
class Tile:
    """What one tile of a kernel computes: ``q`` query tokens by ``kv`` keys of ``heads`` heads."""

    q: int
    kv: int
    heads: int = 1


@dataclasses.dataclass(frozen=True)
class Space:
    """The block sizes of one implementation.

    Args:
        default: the heuristic, ``key -> blocks``; used where nothing is tuned or forced.
        candidates: ``key -> blocks to try``, the heuristic among them.
        refuses: ``(key, blocks) -> None`` or the reason why they do not fit the call.
        tile: ``(role, blocks) -> Tile`` of the kernel with that role (forward, dq, dkv).
        across_masks: a tuned row also serves calls of another mask class. modified: and calls with
            a logit cap or score function; else nothing is tuned with them, and the implementation
            gives ``choose`` what such a call takes.
    """

    default: Callable[[Key], Blocks]
    candidates: Callable[[Key], list[Blocks]]
    refuses: Callable[[Key, Blocks], str | None]
    tile: Callable[[str, Blocks], Tile]
    across_masks: bool = True
    modified: bool = True


SPACES: dict[str, Space] = {}


def register(implementation: str, space: Space) -> None:
    """Make an implementation's block sizes known to the laboratory and to ``attnlab tune``."""
    SPACES[implementation] = space


def space(implementation: str) -> Space:
    """The space of an implementation; ConfigError where it has none."""
    if implementation not in SPACES:
        known = ", ".join(SPACES)
        raise ConfigError(
            f"implementation = {implementation!r}", "has no block sizes to choose",
            f"use one of {known}",
        )
    return SPACES[implementation]


_forced: contextvars.ContextVar[Blocks | None] = contextvars.ContextVar(
    "attnlab_blocks", default=None
)


@contextlib.contextmanager
def forcing(blocks: Blocks) -> Iterator[None]:
    """Kernels traced inside use these block sizes; sizes not named keep their usual value.

    A size that the kernel does not know, or that does not fit its call, is a ConfigError there.
    """
    token = _forced.set(dict(blocks))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> Blocks:
    """What ``forcing`` asks for here, nothing outside of it."""
    return dict(_forced.get() or {})


@dataclasses.dataclass(frozen=True)
class Choice:
    """Block sizes and where they come from: ``forced``, ``default``, or the tuned row's basis."""

    blocks: Blocks
    source: str


_record: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar(
    "attnlab_choices", default=None
)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collect every choice made while tracing inside the block."""
    choices: list[Choice] = []
    token = _record.set(choices)
    try:
        yield choices
    finally:
        _record.reset(token)


def choose(
    key: Key, device: Device | None = None, *, default: Blocks | None = None,
    serves: Callable[[Blocks], bool] = lambda blocks: True,
) -> Choice:
    """The block sizes of a call: forced, else the nearest tuned row that fits, else the heuristic.

    Args:
        default: in place of the heuristic. serves: whether a tuned row may be taken for this call,
            which may be more than its key tells.

    Raises:
        ConfigError: forced sizes are unknown to the implementation or do not fit the call.
    """
    mine = space(key.implementation)
    tuned = _tuned(key, mine, device or Device.default(), default, serves)
    choice = _with_forced(tuned, key, mine)
    record = _record.get()
    if record is not None:
        record.append(choice)
    return choice


def _with_forced(choice: Choice, key: Key, mine: Space) -> Choice:
    forced = _forced.get()
    if forced is None:
        return choice
    both = (mine.default(dataclasses.replace(key, direction=d)) for d in DIRECTIONS)
    known = {name for blocks in both for name in blocks}
    for name in forced:
        if name not in known:
            raise ConfigError(
                f"block size {name!r}", f"{key.implementation} has no such block",
                f"use {', '.join(sorted(known))}",
            )
    blocks = {name: forced.get(name, size) for name, size in choice.blocks.items()}
    reason = mine.refuses(key, blocks)
    if reason is not None:
        text = ", ".join(f"{n}={s}" for n, s in blocks.items())
        raise ConfigError(f"blocks {text}", reason, "force other sizes")
    changed = any(name in forced for name in choice.blocks)
    return Choice(blocks, "forced" if changed else choice.source)


def _tuned(
    key: Key, mine: Space, device: Device, default: Blocks | None, serves: Callable[[Blocks], bool]
) -> Choice:
    bucket = key.bucket()
    found = []
    for row in table(device.kind):
        other = row_key(row)
        distance = bucket.distance(other)
        if other.mask != bucket.mask and not mine.across_masks:
            continue
        if distance > REACH or mine.refuses(key, row["blocks"]) is not None:
            continue
        if serves(row["blocks"]):
            found.append((distance, row))
    if not found:
        return Choice(dict(default or mine.default(key)), "default")
    row = min(found, key=lambda pair: pair[0])[1]
    return Choice(dict(row["blocks"]), f"tuned ({row['basis']} {row['date']})")


def slug(kind: str) -> str:
    """The file name of a device kind: "TPU v5 lite" is ``tpu_v5_lite``."""
    return "".join(c if c.isalnum() else "_" for c in kind.lower())


@functools.cache
def table(kind: str) -> tuple[dict[str, Any], ...]:
    """The tuned rows of a device kind, none where it was not tuned."""
    file = importlib.resources.files("attnlab") / "data" / "tuned" / f"{slug(kind)}.json"
    return tuple(json.loads(file.read_text())["rows"]) if file.is_file() else ()


def row_key(row: dict[str, Any]) -> Key:
    """The key that a tuned row was written for."""
    return Key(**{field.name: row[field.name] for field in dataclasses.fields(Key)})


def fitting(sizes: Sequence[int], length: int) -> list[int]:
    """The sizes that divide a length."""
    return [size for size in sizes if size <= length and length % size == 0]
