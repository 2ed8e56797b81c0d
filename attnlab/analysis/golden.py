"""Golden rows: the schedules of known kernels, so that a slower one does not pass unseen.

A row names what was compiled and what came out: bundles of a full and a partial tile, of a step and
of a row of tiles, and spills, for each kernel. Rows are compared only with the libtpu they were
made with, since schedules move between its versions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab.analysis import aot
from attnlab.analysis.targets import Target, find
from attnlab.core.errors import ConfigError, DataError
from attnlab.ops.attention import OP, tuning
from attnlab.ops.attention.shapes import SHAPES

SLOWER = 0.05  # share by which a schedule may grow
NUMBERS = ("full", "partial", "overhead", "row", "spills")
SHAPE = "llama3.2-1b-4k"  # small, grouped heads
CHECKED = ("v5e", "v6e")  # recompiled in CI


def cells(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """What golden rows are made of: every kernel with block sizes, both passes, one shape."""
    shape = next(shape for shape in SHAPES if shape.name == SHAPE)
    return [
        {"target": target.name, "implementation": name, "direction": direction,
         "shape": dataclasses.asdict(shape), "blocks": None}
        for target in targets if target.platform == "tpu"
        for name in OP.order["tpu"] if name in tuning.SPACES
        for direction in tuning.DIRECTIONS
    ]


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """The golden row of a compiled cell."""
    kernels = {
        kernel["name"]: {name: kernel[name] for name in NUMBERS}
        for kernel in result.get("kernels", [])
    }
    return {
        "target": result["target"], "implementation": result["implementation"],
        "shape": result["shape"]["name"], "direction": result["direction"],
        "blocks": result["blocks"], "compiled": "error" not in result, "kernels": kernels,
    }


def main(path: Path, targets: Sequence[Target]) -> int:
    """Compile and write the rows; 1 where one does not compile."""
    results = list(aot.run(cells(targets)))
    failed = [r for r in results if "error" in r]
    for result in failed:
        print(f"{result['target']} {result['implementation']} {result['direction']}: "
              f"{result['error']}")
    versions = next((r["compiler"] for r in results if "compiler" in r), None)
    if versions is None:
        return 1
    lines = ",\n".join("  " + json.dumps(row_of(result)) for result in results)
    head = f'{{"compiler": {json.dumps(versions)},\n "rows": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{lines}\n]}}\n")
    print(f"{len(results)} rows in {path}, made with libtpu {versions['libtpu']}")
    return 1 if failed else 0


def load(path: Path) -> dict[str, Any]:
    """The golden rows of a file: ``compiler`` and ``rows``; DataError where it holds none."""
    try:
        found = json.loads(path.read_text())
        rows, compiler = found["rows"], found["compiler"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"golden rows {path}", f"cannot be read ({error})",
            f"write them: attnlab bench attention --all-targets --golden {path}",
        ) from None
    return {"rows": rows, "compiler": compiler}


def cell_of(row: dict[str, Any]) -> dict[str, Any]:
    """The cell that a golden row was made from."""
    shapes = {shape.name: shape for shape in SHAPES}
    if row["shape"] not in shapes:
        raise ConfigError(f"shape {row['shape']!r}", "is in no table", "write the rows again")
    find(row["target"])
    return {
        "target": row["target"], "implementation": row["implementation"],
        "direction": row["direction"], "shape": dataclasses.asdict(shapes[row["shape"]]),
        "blocks": row["blocks"],
    }


def complaints(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """How a new schedule is worse than its golden row; empty where it is not."""
    if "error" in result:
        return [f"no longer compiles: {result['error']}"] if row["compiled"] else []
    found = {kernel["name"]: kernel for kernel in result["kernels"]}
    said = []
    for name, old in row["kernels"].items():
        if name not in found:
            said.append(f"kernel {name} is gone")
            continue
        for number in NUMBERS:
            new, limit = found[name][number], old[number] * (1 + SLOWER)
            if new > limit:
                said.append(f"{name}: {number} is {new}, was {old[number]} (at most {limit:.0f})")
    return said
