"""What a compiled TPU program does around its kernels, read from its HLO text.

Copies, transposes and casts around a kernel are bound by memory: their time is the bytes they move
through HBM, with the padding of their layouts, over the bandwidth.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from attnlab.core.errors import DataError

_ARRAY = re.compile(r"([a-z]+\d+|pred)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"^(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_VMEM = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
FREE = {
    "parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id",
    "copy-done", "slice-done", "custom-call", "iota",
}


def read(folder: Path) -> str:
    """The compiled program's text in a folder of reports; DataError where there is none.

    Programs come one a compile; the largest is the one asked for.
    """
    found = sorted(folder.glob("*-TLP-hlo.txt"), key=lambda path: path.stat().st_size)
    if not found:
        raise DataError(
            "the compiler's reports", "hold no program", "use the libtpu of the extra aot"
        )
    return found[-1].read_text(errors="replace")


def _width(dtype: str) -> float:
    return 1.0 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) / 8


def hbm_bytes(text: str) -> list[float]:
    """Bytes in HBM of every array of a type (one, or a tuple): padded, 0 for those on the chip."""
    return [_array_bytes(*found) for found in _ARRAY.findall(text)]


def _array_bytes(dtype: str, dims: str, layout: str, anywhere: bool = False) -> float:
    sizes = [int(d) for d in dims.split(",") if d]
    order, _, rest = layout.partition(":")
    if "S(" in rest and not anywhere:  # a memory space other than HBM
        return 0.0
    tile = re.search(r"T\(([\d,]+)\)", rest)
    minor = [sizes[int(i)] for i in order.split(",") if i]  # from the fastest dimension on
    if tile and minor:
        for i, step in enumerate(reversed([int(t) for t in tile[1].split(",")])):
            if i < len(minor):
                minor[i] = math.ceil(minor[i] / step) * step
        sizes = minor
    return math.prod(sizes) * _width(dtype)


def traffic(text: str) -> float:
    """Bytes that the entry computation moves through HBM outside custom calls."""
    types: dict[str, list[float]] = {}
    total = 0.0
    for line in entry(text):
        found = _LINE.match(line)
        if not found:
            continue
        name, kind, op, rest = found.groups()
        types[name] = hbm_bytes(kind)
        if op in FREE:
            continue
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        if op.endswith("-start"):  # a copy: (destination, source, ...) or ((source), destination)
            # A slice moves what the smaller side holds, which may be the one on the chip.
            sides = [_array_bytes(*side, anywhere=True) for side in _ARRAY.findall(kind)[:2]]
            total += min(sides, default=0.0) * sum(side > 0 for side in types[name][:2])
        else:
            total += sum(types[name]) + sum(sum(types.get(o, [])) for o in operands)
    return total


def entry(text: str) -> list[str]:
    """The lines of the entry computation."""
    _, _, body = text.partition("\nENTRY ")
    return [line.strip() for line in body.partition("\n}\n")[0].splitlines()]


def kernel_vmem(text: str) -> int:
    """Bytes of VMEM that the hungriest Pallas kernel of the program uses."""
    calls = text.split('custom_call_target="tpu_custom_call"')[1:]
    found = [_VMEM.search(call) for call in calls]
    return max((int(match[1]) for match in found if match), default=0)
