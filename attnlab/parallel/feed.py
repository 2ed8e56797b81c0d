"""From the host arrays of each process to global arrays.

``batch_shard`` says which of the ``count`` equal blocks of rows a process holds; ``place`` makes
the global arrays, whose block ``index`` is what the processes of that index pass. A process may
fill its block with any rows of the step: contiguous ones, ``rows[index * b : (index + 1) * b]``,
keep the global order; the loader deals rows out, ``rows[index::count]``, so the order of rows
inside a step depends on the number of blocks, which changes the order of summation, nothing else.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from attnlab.core.errors import MeshError


def place(batch: Mapping[str, np.ndarray], sharding: Sharding) -> dict[str, jax.Array]:
    """Global arrays of this process's rows: ``[b, T]`` becomes ``[b * count, T]``.

    Rows are this process's block; the other axes are whole, also where the mesh cuts them.
    """
    placed = {}
    for name, array in batch.items():
        array = np.asarray(array)
        # As many rows as devices are always divided evenly; the number of blocks is the same.
        _, count = batch_shard(sharding, (len(sharding.device_set), *array.shape[1:]))
        shape = (array.shape[0] * count, *array.shape[1:])
        batch_shard(sharding, shape)  # raises if these rows do not divide
        placed[name] = jax.make_array_from_process_local_data(sharding, array, shape)
    return placed


@functools.lru_cache(maxsize=64)
def batch_shard(sharding: Sharding, global_shape: tuple[int, ...]) -> tuple[int, int]:
    """``(index, count)``: this process loads block ``index`` of ``count`` equal blocks of rows.

    Processes whose devices hold the same rows (the mesh cuts another axis between them) get the
    same index and must load the same rows. MeshError if the blocks are not contiguous, equal and
    aligned.
    """
    try:
        indices = sharding.devices_indices_map(global_shape)
    except ValueError:  # its text is the whole sharding
        raise MeshError(
            f"batch of shape {global_shape}", f"cannot be cut evenly {_cuts(sharding)}",
            "use a batch and a sequence length that the mesh axes divide",
        ) from None
    held = [(d.process_index, i[0].indices(global_shape[0])[:2]) for d, i in indices.items()]
    return block_of(held, jax.process_index(), global_shape[0])


def _cuts(sharding: Sharding) -> str:
    if not isinstance(sharding, NamedSharding):
        return f"over {len(sharding.device_set)} devices"
    cuts = []
    for axis, names in enumerate(sharding.spec):
        names = (names,) if isinstance(names, str) else names or ()
        pieces = math.prod(sharding.mesh.shape[name] for name in names)
        if pieces > 1:
            cuts.append(f"on axis {axis} into {pieces} (mesh axes {', '.join(names)})")
    return " and ".join(cuts)


def block_of(
    held: Iterable[tuple[int, Sequence[int]]], process: int, rows: int
) -> tuple[int, int]:
    """``(index, count)`` of ``process``, from ``(process, (start, stop))`` of every device."""
    spans: dict[int, set[tuple[int, int]]] = {}
    for owner, (start, stop) in held:
        spans.setdefault(owner, set()).add((start, stop))
    if process not in spans:
        raise MeshError(
            f"process {process}", f"owns none of the mesh's devices, processes {sorted(spans)} do",
            "build the mesh from jax.devices()",
        )
    blocks = {owner: _union(owner, pieces) for owner, pieces in spans.items()}
    start, stop = blocks[process]
    size = stop - start
    for owner, (first, last) in blocks.items():
        if last - first != size or first % size or rows % size:
            raise MeshError(
                f"process {owner} holds batch rows {first} to {last - 1} of {rows}",
                f"process {process} holds rows {start} to {stop - 1}, so the rows are not cut into "
                "equal blocks",
                "give every process the same number of devices on the batch axes of the mesh",
            )
    return start // size, rows // size


def _union(owner: int, pieces: set[tuple[int, int]]) -> tuple[int, int]:
    ordered = sorted(pieces)
    for (_, stop), (start, _) in itertools.pairwise(ordered):
        if start != stop:
            raise MeshError(
                f"process {owner} holds batch rows {ordered}",
                f"they have a gap between rows {stop} and {start}",
                "order the mesh's devices so that each process is contiguous on the batch axes",
            )
    return ordered[0][0], ordered[-1][1]
