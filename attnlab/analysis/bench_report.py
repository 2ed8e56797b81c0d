"""The rows of ``attnlab bench attention`` as text: a line a cell, and the table with its ratios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attnlab.analysis.bench_cases import OURS

FLEX = ("flex", "flex-exp", "flex-tuned")  # FlexAttention on Triton; ratios take the fastest
Row = Mapping[str, Any]


def ms(row: Row) -> float | None:
    """The time of a row: of its kernels, else of a call in a full queue; None: not timed."""
    if row.get("reason") is not None or row.get("queued_ms") is None:
        return None
    return row["queued_ms"] if row["device_ms"] is None else row["device_ms"]


def line(row: Row) -> str:
    """One cell, as it is reported while the run goes on."""
    head = f"{row['case']} {row['direction']} {row['impl']}: "
    if ms(row) is None:
        return head + str(row["reason"])
    text = f"{ms(row):.3f} ms, {row['tflops']:.0f} TFLOP/s"
    return head + text + f", wall {row['wall_ms']:.3f} ms, compiled in {row['compile_s']:.1f} s"


def ratio(row: Row, others: Iterable[Row]) -> tuple[float, Row] | None:
    """How many times faster ``row`` is than the fastest of ``others``, and that one.

    Both by kernel time if both have it, else both by the time in a full queue.
    """
    best = None
    for other in others:
        if ms(row) is None or ms(other) is None:
            continue
        both = row["device_ms"] is not None and other["device_ms"] is not None
        name = "device_ms" if both else "queued_ms"
        found = other[name] / row[name]
        if best is None or found < best[0]:
            best = found, other
    return best


def beside(row: Row, rows: Iterable[Row]) -> list[Row]:
    """The other rows of the same call on the same device."""
    same = ("direction", "case", "S", "device")
    return [
        r for r in rows if r["impl"] != row["impl"] and all(r[name] == row[name] for name in same)
    ]


def against(row: Row, rows: Iterable[Row]) -> dict[str, tuple[float, Row] | None]:
    """Ratios of a row to the fastest peer ("peer") and to FlexAttention ("flex")."""
    others = [r for r in beside(row, rows) if r["impl"] not in OURS]
    return {
        "peer": ratio(row, others),
        "flex": ratio(row, [r for r in others if r["impl"] in FLEX]),
    }


def table(rows: list[dict[str, Any]], cells: Iterable[tuple[str, str, str, int]]) -> str:
    """The timed cells and their ratios, then what was not timed and why.

    Args:
        rows: all rows. cells: ``(case, impl, direction, S)`` of those to show, in order.
    """
    cells = list(cells)
    shown = [
        r for cell in cells for r in rows
        if (r["case"], r["impl"], r["direction"], r["S"]) == cell
    ]
    head = ("case", "dir", "impl", "device", "queued", "wall", "TFLOP/s", "roof", "x peer",
            "x flex")
    lines: list[tuple[str, ...]] = [head]
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in shown:
        if ms(row) is None:
            reason = row["reason"].removeprefix(f"{row['impl']}: ")
            reasons.setdefault((row["impl"], reason), {}).setdefault(row["case"], []).append(
                row["direction"]
            )
            continue
        ratios = against(row, rows)
        device = "-" if row["device_ms"] is None else f"{row['device_ms']:.3f}"
        roof = row["roofline_ms"]
        lines.append((
            row["case"], row["direction"], row["impl"], device, f"{row['queued_ms']:.3f}",
            f"{row['wall_ms']:.3f}", f"{row['tflops']:.0f}",
            "-" if roof is None else f"{roof / ms(row):.0%}",
            _ratio(row, ratios["peer"]), _ratio(row, ratios["flex"]),
        ))
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.append("milliseconds; x: times faster than the fastest peer, than FlexAttention"
                " (* measured in another run)")
    text += _extras(shown, rows)
    for (impl, why), which in reasons.items():
        names = [case if len(ways) > 1 else f"{case} {ways[0]}" for case, ways in which.items()]
        text.append(f"{impl}: {why} [{', '.join(names)}]")
    return "\n".join(text)


def _ratio(row: Row, found: tuple[float, Row] | None) -> str:
    if found is None:
        return "-"
    return f"{found[0]:.2f}" + ("" if found[1]["run"] == row["run"] else "*")


def _extras(shown: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[str]:
    """Sentences that need two rows or the device's ceilings."""
    text = []
    for row in shown:
        if ms(row) is None or row["impl"] not in OURS:
            continue
        what = f"{row['case']} {row['direction']} {row['impl']}"
        if row["case"] == "blocks":
            dense = [
                r for r in rows if r["case"] == "causal-128" and r["impl"] == row["impl"]
                and all(r[n] == row[n] for n in ("direction", "S", "device"))
            ]
            found = ratio(row, dense)
            if found:
                text.append(f"{what}: {found[0]:.2f} x faster than dense causal")
            if "transposed_ms" in row:
                text.append(f"{what}: block lists {row['lists_ms']:.3f} ms, transposed"
                            f" {row['transposed_ms']:.3f} ms")
        if row["case"] == "documents" and "lists_ms" in row:
            text.append(f"{what}: block lists of both directions, built once a step,"
                        f" {row['lists_ms']:.3f} ms")
        if row["case"] == "decode" and row["copy_gb_s"]:
            text.append(f"{what}: {row['gb_s']:.0f} GB/s, {row['gb_s'] / row['copy_gb_s']:.0%} of"
                        f" the measured copy")
    timed = [r for r in shown if ms(r) is not None and r["matmul_tflops"]]
    if timed:
        last = timed[-1]
        text.append(f"measured on {last['device']}: bf16 matrix product"
                    f" {last['matmul_tflops']:.0f} TFLOP/s, copy {last['copy_gb_s']:.0f} GB/s")
    return text
