"""Sizes of the Triton kernels by compute capability and width, and what GPUs they are compiled for.

Names of the sizes: ``block_q``, ``block_k`` (tokens of a tile), ``warps`` and ``stages`` (tiles in
flight) of the forward; the same with ``_dq`` and ``_dkv`` for the two backward kernels.
"""

from __future__ import annotations

import re

from attnlab.core.dispatch import Device
from attnlab.ops.attention import tuning

# Compute capability by the name of the device.
KINDS = {
    80: r"\b(A100|A800|A30)\b",
    86: r"\b(A10G?|A16|A2|A40|RTX A\d000|RTX 30\d0)\b",
    89: r"\b(L4|L20|L40S?|RTX 40\d0|Ada)\b",
    90: r"\b(H100|H200|H800|H20|GH200)\b",
}
NAMES = ("block_q", "block_k", "warps", "stages")


def capability(kind: str) -> int | None:
    """The compute capability of a device kind, None where the kernels are not compiled for it."""
    return next((cc for cc, names in KINDS.items() if re.search(names, kind)), None)


def padded(width: int) -> int:
    """The power of two that a width takes inside the kernels."""
    return max(16, 1 << (width - 1).bit_length())


# (block_q, block_k, warps, stages) of the forward, dq, and dk with dv, by the wider of H and V:
# large tiles that the compiler fits without (or nearly without) spilling registers. Below three
# stages Triton starts a copy only when the tile before it is done.
_HOPPER = {
    64: ((128, 128, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    128: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
    256: ((128, 32, 8, 3), (128, 32, 8, 3), (32, 64, 8, 3)),
}
_A100 = {
    64: ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    128: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    256: ((128, 32, 8, 3), (64, 32, 8, 3), (32, 64, 8, 3)),
}
_SMALL = {  # 99 KB of shared memory
    64: ((128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    128: ((128, 32, 8, 3), (64, 32, 4, 3), (32, 64, 8, 3)),
    256: ((64, 16, 4, 3), (32, 16, 4, 3), (16, 32, 4, 3)),
}
_TABLES = {80: _A100, 86: _SMALL, 89: _SMALL, 90: _HOPPER}


def sizes(key: tuning.Key) -> tuning.Blocks:
    """The heuristic."""
    table = _TABLES[capability(Device.default().kind) or 80]
    forward, dq, dkv = table[max(64, padded(max(key.H, key.V)))]
    if key.direction == "forward":
        return dict(zip(NAMES, forward))
    return {f"{name}{end}": x for end, row in (("_dq", dq), ("_dkv", dkv))
            for name, x in zip(NAMES, row)}


def _candidates(key: tuning.Key) -> list[tuning.Blocks]:
    usual, found = sizes(key), []
    for end in ("",) if key.direction == "forward" else ("_dq", "_dkv"):
        for values in ((128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 8, 2)):
            found.append(usual | {f"{name}{end}": x for name, x in zip(NAMES, values)})
    return [usual, *(blocks for blocks in found if blocks != usual)]


def _refuses(key: tuning.Key, blocks: tuning.Blocks) -> str | None:
    for name, size in blocks.items():
        power = size >= 1 and size & (size - 1) == 0
        if name.startswith("block") and not (power and size >= 16):
            return f"{name} = {size} is not a power of two from 16"
        if name.startswith("warps") and not (power and size <= 16):
            return f"{name} = {size} is not a power of two up to 16"
        if name.startswith("stages") and not 1 <= size <= 8:
            return f"{name} = {size} is not from 1 to 8"
    return None


def _tile(role: str, blocks: tuning.Blocks) -> tuning.Tile:
    end = {"forward": "", "dq": "_dq", "dkv": "_dkv"}[role]
    return tuning.Tile(blocks[f"block_q{end}"], blocks[f"block_k{end}"])


tuning.register("triton", tuning.Space(sizes, _candidates, _refuses, _tile))
