"""Does the README's first command pass below 1.95 bits/byte, and how long does it take?

Runs ``attnlab train`` as a new user would, times the whole command, and keeps its rows beside what
gzip -9 makes of the same held-out files in one stream. No device; about 3 minutes on two free
cores. A stored result is kept unless --again is given; the plot is drawn from it alone.

    python experiments/quickstart.py
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from attnlab.analysis.bench import stamp
from attnlab.data.corpus import load_corpus
from attnlab.train.trackers import plot_loss, read

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "quickstart.json"
KEPT = ("step", "tokens", "loss", "val_loss", "val_bits_per_byte", "tokens_per_s")


def measure() -> dict:
    """One run in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "attnlab", "train"], cwd=folder, check=True,
            env={**os.environ, "PYTHONPATH": str(RESULTS.parents[2])},
        )
        seconds = time.perf_counter() - started
        rows = read(f"{folder}/runs/quickstart/metrics.jsonl")
    held_out = [doc.text for doc in load_corpus().val]
    size = sum(map(len, held_out))
    return {
        "command": "attnlab train", "seconds": round(seconds, 1), "cores": os.cpu_count(),
        "fingerprint": rows[-1]["fingerprint"], "held_out_bytes": size,
        "gzip_bits_per_byte": 8 * len(gzip.compress(b"".join(held_out), 9)) / size,
        **stamp(), "rows": [{name: row.get(name) for name in KEPT} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure even if there is a result")
    if parser.parse_args().again or not RESULTS.exists():
        result = measure()
        rows = ",\n".join(json.dumps(row) for row in result.pop("rows"))
        RESULTS.write_text(f'{json.dumps(result)[:-1]},\n"rows": [\n{rows}\n]}}\n')
    result = json.loads(RESULTS.read_text())
    plot_loss(result["rows"], RESULTS.with_suffix(".png"), "quickstart")
    last = result["rows"][-1]
    print(
        f"{last['val_bits_per_byte']:.3f} bits/byte after {last['tokens']:,} tokens on "
        f"{result['held_out_bytes']:,} held-out bytes (gzip -9: "
        f"{result['gzip_bits_per_byte']:.3f}), {result['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    main()
