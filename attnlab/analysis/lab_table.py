"""The tables of the laboratory."""

from __future__ import annotations

from typing import Any

from attnlab.analysis.printing import table
from attnlab.analysis.targets import Target

MIB = 2**20


def show(target: Target, rows: list[dict[str, Any]], baseline: str, direction: str) -> None:
    """Candidates that compiled: ranked by predicted time where there is one."""
    done = sorted((r for r in rows if "error" not in r), key=lambda r: r.get("ms", float("inf")))
    if not done:
        return
    if target.platform == "tpu":
        _tpu(target, done, baseline, direction)
    else:
        _gpu(done, direction)


def sizes(blocks: dict[str, int] | None) -> str:
    """Block sizes with their names."""
    return ",".join(f"{name}={size}" for name, size in blocks.items()) if blocks else "-"


def _shown(blocks: dict[str, int], direction: str) -> dict[str, int]:
    """The blocks of the pass that is compared, all where names do not tell."""
    backward = ("dkv", "dq", "bwd", "backward")
    mine = {
        name: size for name, size in blocks.items()
        if any(word in name for word in backward) == (direction == "backward")
    }
    return mine or blocks


def _numbers(row: dict[str, Any], direction: str) -> str:
    return " ".join(map(str, _shown(row["blocks"] or {}, direction).values())) or "-"


def _legend(rows: list[dict[str, Any]], direction: str) -> None:
    """What the numbers in the column of blocks are, for every implementation."""
    for name, blocks in {r["implementation"]: r["blocks"] for r in rows if r["blocks"]}.items():
        print(f"  blocks of {name}: {' '.join(_shown(blocks, direction))}")


def _tpu(target: Target, rows: list[dict[str, Any]], baseline: str, direction: str) -> None:
    base = min(
        (r["ms"] for r in rows if r["implementation"] == baseline and "ms" in r
         and not r["forced"]),
        default=None,
    )
    columns = (
        "#", "impl", "blocks", "comp. s", "temp MiB", "VMEM MiB", "spills", "tile", "step", "MXU %",
        "kernel ms", "around ms", "predicted ms", "TFLOP/s", "% peak", f"x {baseline}",
    )
    lines = []
    for place, row in enumerate(rows, start=1):
        head = [
            place, row["implementation"], _numbers(row, direction),
            f"{row['compile_s']:.1f}", f"{row['temp_bytes'] / MIB:.0f}",
        ]
        kernels = row["kernels"]
        if not kernels:
            lines.append([*head, *["-"] * 11])
            print(f"  {row['implementation']}: no prediction: {row['unpredicted']}")
            continue
        vmem = row["vmem_bytes"]
        lines.append([
            *head, "-" if vmem is None else f"{vmem / MIB:.1f}",
            _each(kernels, lambda k: k["spills"]),
            _each(kernels, lambda k: f"{k['full']}/{k['partial']}"),
            _each(kernels, lambda k: k["overhead"]),
            _each(kernels, lambda k: f"{100 * k['mxu']:.0f}"),
            f"{row['kernel_ms']:.3f}", f"{row['around_ms']:.3f}", f"{row['ms']:.3f}",
            f"{row['tflops']:.0f}", f"{100 * row['peak_share']:.0f}",
            "-" if base is None else f"{base / row['ms']:.2f}",
        ])
    table(columns, lines)
    _legend(rows, direction)
    kernels = next((row["kernels"] for row in rows if row["kernels"]), [])
    roles = ", ".join(kernel["role"] for kernel in kernels)
    print(f"  kernels: {roles or '-'}; tile: bundles (cycles) of a full/partial one; "
          "step: bundles of every grid step; around: copies and casts outside the kernels")
    if target.efficiency != 1.0:
        print(f"  {target.name}: kernel cycles divided by {target.efficiency}, as published "
              "timings on it were slower than its schedules")


def _each(kernels: list[dict[str, Any]], value) -> str:
    return " ".join(str(value(kernel)) for kernel in kernels)


def _gpu(rows: list[dict[str, Any]], direction: str) -> None:
    columns = (
        "impl", "blocks", "comp. s", "temp MiB", "registers", "spill bytes", "shared KiB", "wgmma",
    )
    lines = []
    for row in rows:
        kernels = row["kernels"]
        shared = _each(
            kernels,
            lambda k: "-" if k["shared_bytes"] is None else f"{k['shared_bytes'] / 1024:.0f}",
        )
        lines.append([
            row["implementation"], _numbers(row, direction), f"{row['compile_s']:.1f}",
            f"{row['temp_bytes'] / MIB:.0f}",
            *(_each(kernels, lambda k, n=name: k[n]) for name in ("registers", "spill_bytes")),
            shared, _each(kernels, lambda k: k["wgmma"]),
        ])
    table(columns, lines)
    _legend(rows, direction)
    for row in rows:
        names = ", ".join(kernel["name"] for kernel in row["kernels"])
        print(f"  kernels of {row['implementation']}: {names or '-'}")
    print(f"  no predicted time: {rows[0]['unpredicted']}")
