"""The work of a Hopper kernel: what it reads of the block lists, and which block does what.

An item is a row of tiles of one head (``order``). A kernel runs one block an item, or a few
*persistent* blocks, one a multiprocessor, that take items until none is left: then copies run ahead
into the next item, and neither a start of a block nor the first loads are waited for. A block takes
the next item when it is free for it; with ``persistent = 2`` it has room to load what that one owns
beside what this one does. Who does an item does not change its result.

Where items wait for others, blocks take the first one from the counter too (``in_order``): an item
is begun when all before it are, however many blocks run at a time.
"""

# Pallas references, layouts and kernels have no types that a checker can follow.
# pyright: reportPrivateImportUsage=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalCall=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnlab.core.dispatch import Device
from attnlab.ops.attention.blocks import BlockLists
from attnlab.ops.attention.gpu_tiles import lead
from attnlab.ops.attention.hopper import cores
from attnlab.ops.attention.order import Items

SLOTS = 4  # items that the copies may be ahead


def given(lists: BlockLists) -> list[Any]:
    """The arrays of block lists that a kernel takes, for ``Listed``."""
    runs = lists.full, lists.partial
    return [lists.work(), *(jnp.asarray(x) for r in runs for x in (r.first, r.count))]


GIVEN = 5  # how many they are


def blocks(items: int, persistent: int) -> int:
    """How many blocks do the items: one a multiprocessor if persistent, else one an item."""
    return min(items, cores(Device.default().kind)) if persistent else items


def launched(kernel: Callable[..., Any], counts: bool) -> Callable[..., Any]:
    """A kernel to be called; ``counts``: it counts in device memory.

    vmap gives a kernel one more axis of blocks, but no counters of its own to each of its rows.
    One that has any is run for them one after the other.
    """
    return jax.custom_batching.sequential_vmap(kernel) if counts else kernel


def buffers(items: Items, blocks: int, persistent: int) -> int:
    """For how many items a block has room for what they own."""
    return persistent if blocks < items.count else 1


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of one kind in a row: references, where they start, how many, and the first one."""

    firsts: Any
    counts: Any
    lead: Any
    start: Any
    number: Any
    first: Any
    count: Any

    def at(self, e):
        """First tile and number of tiles of entry ``e`` of the lists."""
        return self.firsts[*self.lead, e], self.counts[*self.lead, e]

    def visit(self, step, carry):
        """``carry = step(tile, carry)`` over the tiles, in order."""

        def run(e, carry):
            first, count, carry = carry
            carry = lax.fori_loop(0, count, lambda i, c: step(first + i, c), carry)
            return *self.at(self.start + jnp.minimum(e + 1, self.number - 1)), carry

        return lax.fori_loop(0, self.number, run, (self.first, self.count, carry))[-1]

    def visit_back(self, step, carry, times: int = 1):
        """``carry = step(e, tile, carry)`` from the last tile to the first, ``times`` a tile."""

        def run(e, carry):
            first, count = self.at(self.start + self.number - 1 - e)

            def visit(i, carry):
                back = lax.div(i, times)
                return step(i - back * times, first + count - 1 - back, carry)

            return lax.fori_loop(0, count * times, visit, carry)

        return lax.fori_loop(0, self.number, run, carry)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of tiles: its index, how many tiles it visits, and which."""

    index: Any
    tiles: Any
    full: Runs
    partial: Runs


class Listed:
    """Block lists inside a kernel, from references to ``given(lists)``."""

    def __init__(self, refs):
        self.work, *self.runs = refs

    def index(self, b, n, r):
        """The index of the r-th longest row."""
        return self.work[*lead(self.work, b, n), r, 0]

    def tiles(self, b, n, r):
        """How many tiles that row visits."""
        return self.work[*lead(self.work, b, n), r, 1]

    def row(self, b, n, r) -> Row:
        """The r-th longest row of batch row b and head n."""
        at = lead(self.work, b, n)
        index, tiles, *rest = (self.work[*at, r, i] for i in range(10))
        full, partial = (
            Runs(first, count, lead(first, b, n), *numbers) for first, count, numbers in (
                (*self.runs[:2], rest[:4]), (*self.runs[2:], rest[4:])
            )
        )
        return Row(index, tiles, full, partial)


def drain(free, used, stages: int):
    """Wait until the consumers have freed every slot of a ring that was ``used`` so many times."""
    for slot in range(stages):
        pl.when(used > slot)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))


@dataclasses.dataclass(frozen=True)
class Queue:
    """Who does which item; with as many ``blocks`` as ``items`` each has its own.

    Args:
        buffers: 2 where there is room to load what the next item owns beside this one's, else 1.
        box: int32 ``[SLOTS]`` in shared memory, from the copying warpgroup to those that compute.
            ready, taken: barriers of its slots. interpret: see ``gpu_attend``. in_order: see above.
    """

    items: Items
    blocks: int
    buffers: int
    box: Any
    ready: Any
    taken: Any
    interpret: Any
    in_order: bool = False

    @property
    def persistent(self) -> bool:
        return self.in_order or self.blocks < self.items.count

    def place(self, item):
        """See ``Items.place``."""
        return self.items.place(item)

    def compute(self, work, load, registers: int, rings=()):
        """The part of a warpgroup that computes: ``after, it = work(buffer, item, pull, it)`` for
        each item of this block. it is 0 before the first.

        ``load(item, buffer)`` starts the copies of what an item owns; called here for the first
        one. rings: see ``copy``. The work calls ``early`` once its results before these have long
        left, and ``late`` when its own have, and returns what that returns.
        """
        if self.interpret is None:
            plgpu.set_max_registers(registers, action="increase")
        if self.in_order:
            first = self._pull(jnp.int32(0))
            pl.when(first < self.items.count)(lambda: load(first, 0))
        else:
            first = lax.axis_index("tile")
            load(first, 0)
        it = self._compute(work, first)
        for free, slots in rings:
            drain(free, it, slots)
        plgpu.wait_smem_to_gmem(0)

    def early(self, pull, load, buffer):
        """Where there is a second buffer: learn the next item and load what it owns."""
        return self._next(pull, load, 1 - buffer) if self.buffers > 1 else None

    def late(self, after, pull, load):
        """The next item, their number or more where there is none, as ``early`` found it or
        loaded now over outputs that are written by then."""
        return self._next(pull, load, 0) if after is None else after

    def _next(self, pull, load, buffer):
        after = pull()
        if self.persistent:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(after < self.items.count)(lambda: load(after, buffer))
        return after

    def _compute(self, work, first):
        zero = jnp.int32(0)
        if not self.persistent:
            return work(zero, first, lambda: jnp.int32(self.items.count), zero)[1]

        def one(state):
            turn, item, it = state
            buffer = lax.rem(turn, self.buffers)
            return turn + 1, *work(buffer, item, functools.partial(self._pull, turn), it)

        return self._loop(one, first)[-1]

    def _pull(self, turn):
        """The item that the copying warpgroup has learned of in that turn."""
        slot = lax.rem(turn, SLOTS)
        plgpu.barrier_wait(self.ready.at[slot])
        after = self.box[slot]
        plgpu.barrier_arrive(self.taken.at[slot])
        return after

    def copy(self, load, rings, registers: int):
        """The part of the warpgroup that copies: ``it = load(item, it)`` for each item.

        rings: ``(free, slots)`` of each ring that ``it`` counts the tiles of; they are drained.
        """
        if self.interpret is None:
            plgpu.set_max_registers(registers, action="decrease")
        it = self._copy(load, lax.axis_index("tile"))
        for free, slots in rings:
            drain(free, it, slots)

    def _copy(self, load, first):
        if not self.persistent:
            return load(first, jnp.int32(0))
        counter = None
        if self.interpret is None:
            counter = pl.get_global(plgpu.SemaphoreType.REGULAR)

        def announce(turn, item):
            """Take the item after this one."""
            slot = lax.rem(turn, SLOTS)
            pl.when(turn >= SLOTS)(lambda: plgpu.barrier_wait(self.taken.at[slot]))
            if counter is None:
                self.box[slot] = item + self.blocks
            else:
                _take(counter, 0 if self.in_order else self.blocks, self.box.at[slot])
            plgpu.barrier_arrive(self.ready.at[slot])

        def learned(turn):
            slot = lax.rem(turn, SLOTS)
            plgpu.barrier_wait(self.ready.at[slot])
            return self.box[slot]

        def one(state):
            turn, item, it = state
            announce(turn, item)
            it = load(item, it)
            return turn + 1, learned(turn), it

        if self.in_order:
            announce(jnp.int32(0), first - self.blocks)
            first = learned(jnp.int32(0))
        turn, _, it = self._loop(one, first)
        drain(self.taken, turn, SLOTS)
        return it

    def _loop(self, one, first):
        start = jnp.int32(self.in_order), first, jnp.int32(0)
        return lax.while_loop(lambda state: state[1] < self.items.count, one, start)


def _take(counter, first: int, box):
    """``box = first + counter``, ``counter += 1`` in one step that no other block can split.

    A thread of the last warp waits for the answer; copies are started from the first.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, memref

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=())
    def take(_, counter, box):
        def number(n):
            return mgpu.utils.c(n, ir.IntegerType.get_signless(32))

        thread = arith.remui(mgpu.utils.thread_idx(), number(128))
        with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.eq, thread, number(96))):
            ticket = llvm.atomicrmw(
                llvm.AtomicBinOp.add, mgpu.utils.memref_ptr(counter), number(1),
                llvm.AtomicOrdering.monotonic, syncscope="device",
            )
            memref.store(arith.addi(ticket, number(first)), box, [])

    take(counter, box)


def spaces(persistent: bool, consumers: int) -> tuple[Any, ...]:
    """What ``Queue`` wants of shared memory: box, ready, taken, or None each."""
    if not persistent:
        return None, None, None
    return (
        plgpu.SMEM((SLOTS,), jnp.int32), plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=consumers, num_barriers=SLOTS),
    )
