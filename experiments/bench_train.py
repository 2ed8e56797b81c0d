"""How fast is a training step? 350m and 1b GQA decoders, T = 4096, bf16, on this accelerator.

    python experiments/bench_train.py             # times every cell that has no row for this device
    python experiments/bench_train.py --plot      # only draws the plot from the stored rows

Device minutes: about 1 a cell. Rows: results/bench_train.json; plot: results/bench_train.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROWS = RESULTS / "bench_train.json"
CELLS = (("350m", 8), ("1b", 8), ("1b", 16))
GOALS = {"350m": 0.42, "1b": 0.48}


def measure() -> None:
    import jax

    from attnlab.analysis import bench

    kind = jax.devices()[0].device_kind
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    done = {(r["recipe"], r["batch"]) for r in rows if r["device"] == kind}
    for recipe, batch in CELLS:
        if (recipe, batch) in done:
            print(f"{recipe} batch {batch}: measured already on {kind}")
            continue
        row = bench.train(recipe, batch, steps=40)
        row["command"] = "python experiments/bench_train.py"
        bench.append(ROWS, row)
        print(f"{recipe} batch {batch}: {row['step_ms']:.1f} ms, MFU {row['mfu']:.1%}")


def plot() -> None:
    from matplotlib.figure import Figure

    rows = [r for r in json.loads(ROWS.read_text()) if r["mfu"] is not None]
    names = [f"{r['recipe']}, batch {r['batch']}\n{r['device']}" for r in rows]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(names, [100 * r["mfu"] for r in rows], color="#4477aa")
    axes.bar_label(bars, fmt="%.1f %%")
    for bar, row in zip(bars, rows, strict=True):
        goal = 100 * GOALS[row["recipe"]]
        left = bar.get_x()
        axes.plot([left, left + bar.get_width()], [goal, goal], color="#cc3311", lw=2)
    axes.plot([], [], color="#cc3311", lw=2, label="goal")
    axes.set_ylabel("model FLOP utilisation (%)\nof 989 TFLOP/s")
    axes.set_ylim(0, 70)
    axes.legend()
    axes.set_title("Training step, T = 4096, bf16: causal pairs counted, no credit for remat")
    figure.savefig(RESULTS / "bench_train.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    if not parser.parse_args().plot:
        measure()
    plot()
