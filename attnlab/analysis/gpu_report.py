"""Read what ptxas reports of Mosaic GPU kernels: registers, spills, shared memory, products.

``MOSAIC_GPU_DUMP_TO`` makes the compiler write one ``.ptxas`` report and one ``.ptx`` a kernel.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from attnlab.core.errors import DataError

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_USED = re.compile(r"Used (\d+) registers")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def read(folder: Path) -> list[dict[str, Any]]:
    """One row a Mosaic GPU kernel: ``name, registers, spill_bytes, shared_bytes, wgmma``.

    Raises:
        DataError: a report cannot be read.
    """
    rows = []
    for path in sorted(folder.rglob("*.ptxas")):
        rows.append(parse(path.stem, path.read_text(), _beside(path, ".ptx"),
                          _beside(path, ".resources.txt")))
    return rows


def _beside(path: Path, suffix: str) -> str:
    other = path.with_suffix("").with_suffix(suffix) if suffix == ".ptx" else (
        path.with_name(path.stem + suffix)
    )
    return other.read_text(errors="replace") if other.exists() else ""


def parse(name: str, ptxas: str, ptx: str, resources: str = "") -> dict[str, Any]:
    """The row of one kernel from the text of its reports; DataError where it is unreadable."""
    used, spill = _USED.search(ptxas), _SPILL.search(ptxas)
    if not used:
        raise DataError(
            f"ptxas report of {name}", "names no registers", "use the wheels of the extra aot"
        )
    entry = _ENTRY.search(ptxas)
    shared = re.search(r"smem[^\d\n]*(\d+)", resources, re.I)
    return {
        "name": entry[1] if entry else name,
        "registers": int(used[1]),
        "spill_bytes": int(spill[1]) + int(spill[2]) if spill else 0,
        "shared_bytes": int(shared[1]) if shared else None,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
    }
