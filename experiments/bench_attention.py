"""How fast is the attention op beside its peers? B = 1, 16,384 tokens, bf16, one Hopper GPU.

    python experiments/bench_attention.py --seconds 450   # the cells that have no fresh row
    python experiments/bench_attention.py --plot          # only draws plot and table from the rows

Device minutes: about 20 for all cells (a FlexAttention cell compiles for 10 to 20 s); each command
goes on where the last one stopped. Rows: results/bench_attention.json; plot:
results/bench_attention.png; the table is printed in Markdown. Times are of kernels, summed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from attnlab.analysis import bench_report
from attnlab.analysis.bench_cases import BOTH, CASES, FORWARD
from attnlab.core.errors import DataError

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "bench_attention.json"
COLOURS = {
    "gpu": "#cc3311", "flex": "#4477aa", "flex-exp": "#88bbee", "flex-fa4": "#66ccee",
    "torch-cudnn": "#ccbb44", "cudnn": "#228833", "tokamax": "#aa3377", "gpu-wide": "#ee7733",
    "triton": "#882255", "xla": "#bbbbbb",
}
LENGTH = 16384


def measure(options: argparse.Namespace) -> None:
    from attnlab.cli import main

    words = ["bench", "attention", "--out", str(ROWS)]
    for name in ("seconds", "case", "impl"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    code = main(words)
    if code:
        raise SystemExit(code)


def timed() -> tuple[list[dict], str]:
    """The timed rows of the device that has most of them."""
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    rows = [r for r in rows if bench_report.ms(r) is not None and r["S"] == LENGTH]
    if not rows:
        raise DataError(f"file {ROWS.name}", "holds no timed row", "measure first, on a GPU")
    device = Counter(r["device"] for r in rows).most_common(1)[0][0]
    return [r for r in rows if r["device"] == device], device


def plot() -> None:
    from matplotlib.figure import Figure

    rows, device = timed()
    names = [c.name for c in CASES if any(r["case"] == c.name for r in rows) and c.name != "decode"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, direction in zip(figure.subplots(2, 1), (FORWARD, BOTH), strict=True):
        found = {(r["case"], r["impl"]): r["tflops"] for r in rows if r["direction"] == direction}
        impls = [i for i in COLOURS if any(impl == i for _, impl in found)]
        for slot, impl in enumerate(impls):
            here = [i for i, name in enumerate(names) if (name, impl) in found]
            left = [i + 0.8 * ((slot + 0.5) / len(impls) - 0.5) for i in here]
            heights = [found[names[i], impl] for i in here]
            axes.bar(left, heights, 0.8 / len(impls), color=COLOURS[impl], label=impl)
        axes.set_xticks(range(len(names)), names, rotation=20)
        axes.set_ylabel(f"{direction}\nTFLOP/s of visible pairs")
        if impls:
            axes.set_ylim(top=1.18 * max(found.values()))  # room for the legend
            axes.legend(ncols=len(impls), fontsize="small")
    figure.suptitle(f"Attention, B = 1, {LENGTH} tokens, bf16, {device}: kernel time")
    figure.savefig(RESULTS / "bench_attention.png", dpi=120)


def table() -> str:
    """Ours beside FlexAttention and the fastest peer, in Markdown."""
    rows, device = timed()
    lines = [
        f"| {device} | | ours: ms, TFLOP/s | fastest peer | x | FlexAttention ms | x |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for direction in case.directions:
            ours = [
                r for r in rows if r["case"] == case.name and r["direction"] == direction
                and r["impl"] in bench_report.OURS
            ]
            if not ours:
                continue
            row = min(ours, key=lambda r: bench_report.ms(r))
            ratios = bench_report.against(row, rows)
            cells = [case.name, direction, f"{row['impl']}: {bench_report.ms(row):.3f},"
                     f" {row['tflops']:.0f}"]
            for name in ("peer", "flex"):
                if ratios[name] is None:
                    cells += ["-", "-"]
                    continue
                times, other = ratios[name]
                text = f"{bench_report.ms(other):.3f}"
                cells += [f"{other['impl']}: {text}" if name == "peer" else text, f"{times:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only draw the plot and the table")
    for flag, kind in (("--seconds", float), ("--case", str), ("--impl", str)):
        parser.add_argument(flag, type=kind, help="as in attnlab bench attention")
    options = parser.parse_args()
    if not options.plot:
        measure(options)
    plot()
    print(table())
