"""How fast are our TPU kernels beside splash's, at everybody's best block sizes? No device needed.

    python experiments/tpu_attention.py                  # the cells that have no row yet
    python experiments/tpu_attention.py --plot           # only draws plot and table from the rows

Every cell is compiled by the real TPU compiler for a chip that is not here and read by the static
cycle model (``attnlab.analysis.tpu_model``); nothing is measured. Published timings of tokamax's
splash (the tables of its own tuning, on hardware) stand beside the predictions. About a minute of
one core a cell; each command goes on where the last one stopped. Needs libtpu (extra ``aot``), and
for the peer tokamax (extra ``kernels``, Python 3.12).

One head is compiled (B = 2, N = 1) and its time multiplied by the heads of the call, which is exact
for these kernels: every count of the model is one a head. Copies around the kernels are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnlab.analysis import aot, bench
from attnlab.analysis.targets import TARGETS, find
from attnlab.core.errors import DataError
from attnlab.ops.attention.shapes import Shape

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "tpu_attention.json"
CHIPS = ("v6e", "v5e", "v7x", "v5p")
IMPLS = ("tpu", "splash", "tokamax-splash")
COLOURS = {"tpu": "#cc3311", "splash": "#4477aa", "tokamax-splash": "#aa3377",
           "published": "#bbbbbb"}
B, T = 2, 8192
HEADS = {128: 16, 256: 8}  # width to heads of the call
# ms of tokamax's tuned kernels on hardware, from the tables in its 0.0.17 release, copies of the
# layout included (forward: flash_attention, backward: flash_attention_vjp).
PUBLISHED = {
    ("v5p", 128, "forward"): 1.923, ("v6e", 128, "forward"): 2.432, ("v7x", 128, "forward"): 2.139,
    ("v5p", 256, "forward"): 1.794, ("v6e", 256, "forward"): 1.502, ("v7x", 256, "forward"): 1.291,
    ("v7x", 128, "backward"): 4.711, ("v7x", 256, "backward"): 2.859,
}


def sizes(impl: str, direction: str, chip: str, width: int) -> Iterator[dict[str, int]]:
    """The block sizes worth a compile, the likely winner first."""
    wide = chip in ("v6e", "v7x")  # chips with matrix units of 256 x 256
    if impl == "tpu":
        found = {
            "forward": [(1024, 1024), (2048, 1024), (1024, 2048), (512, 1024)],
            "backward": [(1024, 1024), (1024, 512), (512, 512), (512, 1024)],
        }[direction]
        names = {"forward": ("block_q", "block_k"), "backward": ("block_q_bwd", "block_k_bwd")}
        yield from (dict(zip(names[direction], x)) for x in found)
    elif direction == "forward":
        names = ("block_q", "block_kv", "block_kv_compute")
        more: dict[str, int] = {}
        transposed = [{}]
        if impl == "tokamax-splash":
            more, transposed = {"other_scheduler": int(wide)}, [{"k_transposed": i} for i in (0, 1)]
        found = [(1024, 1024, 512), (2048, 2048, 512)]
        found += [] if wide else [(1024, 1024, 256)]
        for x in found:
            yield from (dict(zip(names, x)) | more | y for y in transposed)
        if impl == "splash":
            yield from (dict(zip(names, x)) for x in ((1024, 2048, 512), (2048, 1024, 512)))
            yield dict(zip(names, (1024, 1024, 1024)))
    elif impl == "splash":
        names = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
        for x in ((1024, 1024, 512), (1024, 1024, 1024), (512, 1024, 512), (512, 512, 512)):
            yield dict(zip(names, (*x, *x[:2])))
    else:
        names = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
        for x in ((2048, 2048, 512), (1024, 1024, 1024), (1024, 1024, 512)):
            yield dict(zip(names, x))


def cells(chips: list[str]) -> Iterator[dict[str, Any]]:
    for width, heads in HEADS.items():
        shape = Shape(f"one of {heads} x {width}", B, T, 1, 1, width, width)
        for direction in ("forward", "backward"):
            for chip in chips:
                for impl in IMPLS:
                    for blocks in sizes(impl, direction, chip, width):
                        if direction == "backward" and impl == "tpu":  # not what is looked at
                            blocks |= {"block_q": 512, "block_k": 512}
                        elif direction == "backward":
                            blocks |= {"block_q": 512, "block_kv": 512, "block_kv_compute": 512}
                        yield {
                            "target": chip, "implementation": impl, "direction": direction,
                            "shape": dataclasses.asdict(shape) | {"tags": []}, "blocks": blocks,
                        }


def key(cell: dict[str, Any]) -> tuple:
    names = ("target", "implementation", "direction")
    asked = cell.get("asked", cell["blocks"])
    return *(cell[n] for n in names), cell["shape"]["H"], tuple(sorted(asked.items()))


def kernel_ms(row: dict[str, Any]) -> float | None:
    """Predicted milliseconds of the pass for all heads; None where it does not compile."""
    if "error" in row:
        return None
    heads = HEADS[row["shape"]["H"]]
    forward = row["direction"] == "forward"
    mine = [k["seconds"] for k in row["kernels"] if (k["role"] == "forward") == forward]
    return 1e3 * heads * sum(mine)


def measure(path: Path, chips: list[str], impls: list[str], seconds: float) -> None:
    """Compile what has no row yet, one chip after the other."""
    done = {key(row) for row in bench.stored(path)}
    waiting = [
        cell for cell in cells(chips) if key(cell) not in done and cell["implementation"] in impls
    ]
    print(f"{len(waiting)} cells without a row")
    started = time.monotonic()
    for cell in waiting:
        if time.monotonic() - started > seconds:
            print("out of time: the next command goes on from here")
            return
        (row,) = aot.run([cell])
        versions = {n: aot.version(n) for n in ("jax", "libtpu", "tokamax")}
        row |= {
            "bench": "tpu_attention", "basis": "predicted (static model), nothing measured",
            "asked": cell["blocks"], "heads": HEADS[row["shape"]["H"]], "ms": kernel_ms(row),
            "versions": versions, "date": datetime.date.today().isoformat(),
            "command": "python experiments/tpu_attention.py",
        }
        for name in ("kernel_ms", "around_ms", "tflops", "peak_share", "temp_bytes", "compiler"):
            row.pop(name, None)  # of one head: not what is asked
        bench.append(path, row)
        said = row["error"][:80] if "error" in row else f"{row['ms']:.3f} ms"
        print(*key(cell)[:4], json.dumps(cell["blocks"]), said, flush=True)


def best(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, Any]]:
    """The fastest row of every chip, width, pass and implementation."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if row["ms"] is None:
            continue
        at = row["target"], row["shape"]["H"], row["direction"], row["implementation"]
        if at not in found or row["ms"] < found[at]["ms"]:
            found[at] = row
    return found


def copies_ms(chip: str, width: int, direction: str) -> float:
    """What copying q, k, v, o (backward: q, k, v, do, dq, dk, dv) into another layout takes."""
    arrays = 4 if direction == "forward" else 7
    return 1e3 * arrays * 2 * (B * T * HEADS[width] * width * 2) / find(chip).bandwidth


def tried(row: dict[str, Any]) -> str:
    mine = "bwd", "dkv", "dq"
    backward = row["direction"] == "backward"
    chosen = {n: x for n, x in row["asked"].items() if any(w in n for w in mine) == backward}
    return " ".join(str(x) for x in chosen.values())


def table(path: Path) -> str:
    """The best of everybody, and the published timings, in Markdown."""
    rows = best(bench.stored(path))
    lines = [
        "| chip, width, pass | tpu | splash | tokamax-splash | tpu is x the faster peer "
        "| tokamax-splash and copies | published |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip in (name for name in TARGETS if name in CHIPS):
        for width in HEADS:
            for direction in ("forward", "backward"):
                here = {i: rows.get((chip, width, direction, i)) for i in IMPLS}
                if all(row is None for row in here.values()):
                    continue
                cells = [
                    "-" if row is None else f"{row['ms']:.3f} ({tried(row)})"
                    for row in here.values()
                ]
                peers = [row["ms"] for i, row in here.items() if row is not None and i != "tpu"]
                ours, theirs = here["tpu"], here["tokamax-splash"]
                ratio = f"{min(peers) / ours['ms']:.2f}" if ours and peers else "-"
                whole = "-"
                if theirs is not None:
                    whole = f"{theirs['ms'] + copies_ms(chip, width, direction):.2f}"
                known = PUBLISHED.get((chip, width, direction))
                cells += [ratio, whole, "-" if known is None else f"{known:.2f}"]
                lines.append(f"| {chip}, {width}, {direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(path: Path) -> None:
    from matplotlib.figure import Figure

    rows = best(bench.stored(path))
    if not rows:
        raise DataError(f"file {path.name}", "holds no predicted row", "run it without --plot")
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, direction in zip(figure.subplots(2, 1), ("forward", "backward"), strict=True):
        places = [(c, w) for w in HEADS for c in TARGETS if c in CHIPS]
        for slot, impl in enumerate([*IMPLS, "published"]):
            bars = []
            for at, (chip, width) in enumerate(places):
                row = rows.get((chip, width, direction, impl))
                ms = None if row is None else row["ms"]
                ms = PUBLISHED.get((chip, width, direction)) if impl == "published" else ms
                if ms is not None:
                    bars.append((at + 0.2 * (slot - 1.5), ms))
            if bars:
                axes.bar(*zip(*bars), 0.2, color=COLOURS[impl], label=impl)
        axes.set_xticks(range(len(places)), [f"{chip}\n{width}" for chip, width in places])
        axes.set_ylabel(f"{direction}, ms")
        axes.legend(ncols=4, fontsize="small")
    figure.suptitle(
        f"Causal attention, B = {B}, {T} tokens, 16 x 128 or 8 x 256, bf16: kernels predicted from "
        "schedules;\npublished: tokamax's tuned splash on hardware, with its copies"
    )
    figure.savefig(RESULTS / "tpu_attention.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only draw the plot and the table")
    parser.add_argument("--target", default=",".join(CHIPS), help="chips, in this order")
    parser.add_argument("--impl", default=",".join(IMPLS), help="implementations to compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of rows")
    options = parser.parse_args()
    if not options.plot:
        measure(
            options.rows, options.target.split(","), options.impl.split(","), options.seconds
        )
    plot(options.rows)
    print(table(options.rows))
