"""Which sizes of the attention kernels are fastest on this GPU, for the calls of the bench?

    python experiments/attention_sizes.py --case documents,causal-64 --seconds 240
    python experiments/attention_sizes.py --case gqa-128 --try fused_dkv=1,stages_dkv=2,turns_dkv=0
    python experiments/attention_sizes.py --table     # only prints the stored rows

Candidates are those of ``attnlab tune``, and those of ``--try`` (on top of the heuristic); tune
itself knows plain causal and window calls only. They are compiled by several processes at once and
timed by one at a time, three rounds in turn, so that all see the card as warm: a hundred take
about three device minutes. What disagrees with the dense reference gets the reason and no time.
Rows: results/attention_sizes.json, a row a case, direction, sizes and device; the ones of before
stay until they are measured again.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attnlab.analysis import bench_cases
from attnlab.analysis.bench import save, stored
from attnlab.analysis.bench_cases import BOTH, Case, Decode
from attnlab.analysis.bench_report import ms as time_of
from attnlab.analysis.bench_timing import merged
from attnlab.analysis.bench_worker import Worker
from attnlab.core.errors import ConfigError
from attnlab.ops.attention import tuning

ROWS = Path(__file__).parent / "results" / "attention_sizes.json"
ROUNDS, CELL_S = 3, 120.0
Job = tuple[Case, str, dict[str, int]]


def sizes_of(text: str) -> dict[str, int]:
    """``"stages=2,block_k=64"`` as a dict."""
    found = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        try:
            found[name.strip()] = int(size)
        except ValueError:
            raise ConfigError(f"--try {text}", "is not name=number,...", "e.g. stages=2") from None
    return found


def jobs(
    cases: list[Case | Decode], impl: str, directions: tuple[str, ...], more: list[dict[str, int]]
) -> list[Job]:
    """The heuristic of every case and direction first, then what may be better."""
    space = tuning.space(impl)
    first: list[Job] = []
    rest: list[Job] = []
    for case in cases:
        if isinstance(case, Decode):
            continue
        for way in case.directions:
            if way not in directions:
                continue
            direction: tuning.Direction = "backward" if way == BOTH else "forward"
            key = tuning.Key(
                impl, direction, case.H, case.V, case.N // case.K, "bfloat16", case.S, case.S,
                "causal" if case.sight == "causal" else "other",
            )
            usual = space.default(key)
            first.append((case, way, {}))
            tried = [
                {n: x for n, x in blocks.items() if x != usual[n] or n.startswith("fused")}
                for blocks in space.candidates(key)
            ]
            tried += [{n: x for n, x in sizes.items() if n in usual} for sizes in more]
            rest += [(case, way, sizes) for i, sizes in enumerate(tried)
                     if sizes and sizes not in tried[:i]]
    return first + rest


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of this run, in the order in which they were done."""
    started = time.monotonic()
    cases = bench_cases.chosen(options.case, options.seq_len)
    ways = tuple(options.direction.split(","))
    waiting = iter(jobs(cases, options.impl, ways, [sizes_of(x) for x in options.tries or ()]))
    alone, taking = threading.Lock(), threading.Lock()
    rows: list[dict[str, Any]] = []

    def left() -> float:
        return options.seconds - (time.monotonic() - started)

    with tempfile.TemporaryDirectory() as folder:
        lead = Worker("jax")
        stamp = lead.stamp()
        if "reason" in stamp:
            raise ConfigError("jax", stamp["reason"], "run it where there is a GPU")
        exact = {}
        for case in cases:
            if isinstance(case, Case):
                exact[case.name] = path = str(Path(folder) / f"{case.name}.npz")
                reply = lead.ask("reference", CELL_S, case=case, path=path)
                if "reason" in reply:
                    lead.stop()
                    raise ConfigError(f"reference of {case.name}", reply["reason"], "leave it out")
        lead.stop()
        fixed = {
            "bench": "sizes", "impl": options.impl, "device": stamp["stamp"]["device"],
            "versions": stamp["stamp"]["versions"], "date": datetime.date.today().isoformat(),
        }

        def serve(_: int) -> None:
            worker = Worker("jax")
            try:
                worker.stamp()
                for job in taken():
                    row = _row(worker, job)
                    with taking:
                        rows.append(fixed | row)
                        print(_line(rows[-1]), flush=True)
                        _store(options.out, rows[-1])
            finally:
                worker.stop()

        def taken() -> Iterator[Job]:
            while left() > 0:
                with taking:
                    job = next(waiting, None)
                if job is None:
                    return
                yield job

        def _row(worker: Worker, job: Job) -> dict[str, Any]:
            case, way, sizes = job
            row = {"case": case.name, "direction": way, "S": case.S, "sizes": sizes}
            about = {"impl": options.impl, "direction": way}
            found = worker.ask("compile", CELL_S, case=case, sizes=sizes, **about)
            if "reason" not in found:
                with alone:
                    found |= worker.ask("check", CELL_S, reference=exact[case.name], **about)
            rounds = []
            for _ in range(ROUNDS):
                if found.get("reason") is not None:
                    return row | found
                with alone:
                    rounds.append(worker.ask("time", CELL_S, **about))
                found |= {"reason": rounds[-1].pop("reason", None)}
            return row | found | merged(rounds)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(serve, range(options.jobs)))
    unmeasured = sum(1 for _ in waiting)
    if unmeasured:
        print(f"not measured within {options.seconds:g} s: {unmeasured} candidates")
    return rows


def _store(out: Path, row: dict[str, Any]) -> None:
    def key(row):
        return *(row[n] for n in ("case", "impl", "direction", "S", "device")), str(row["sizes"])

    save(out, [old for old in stored(out) if key(old) != key(row)] + [row])


def _line(row: dict[str, Any], usual: float | None = None) -> str:
    sizes = " ".join(f"{n}={x}" for n, x in row["sizes"].items()) or "the heuristic"
    ms = time_of(row)
    if ms is None:
        return f"{row['case']:13} {row['direction']:8} {sizes}: {row.get('reason')}"
    ratio = "" if usual is None else f"{ms / usual:7.3f}"
    spread = max(row["rounds_ms"]) / min(row["rounds_ms"]) - 1
    return f"{row['case']:13} {row['direction']:8} {ms:8.3f} ms{ratio} +-{spread:4.0%}  {sizes}"


def table(rows: list[dict[str, Any]]) -> str:
    """Every case and direction, the fastest sizes first, with their time over the heuristic's."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["device"], row["case"], row["direction"], row["S"]), []).append(row)
    lines = []
    for members in groups.values():
        usual = next((time_of(row) for row in members if not row["sizes"]), None)
        timed = [row for row in members if time_of(row) is not None]
        lines += [_line(row, usual) for row in sorted(timed, key=lambda row: time_of(row) or 0)]
        lines += [_line(row) for row in members if time_of(row) is None]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="comma-separated cases of attnlab bench attention")
    parser.add_argument("--impl", default="gpu", help="implementation (default: gpu)")
    parser.add_argument("--direction", default="fwd,fwd+bwd", help="default: fwd,fwd+bwd")
    parser.add_argument("--try", dest="tries", action="append", metavar="NAME=SIZE,...",
                        help="one more candidate, also several times")
    parser.add_argument("--jobs", type=int, default=12, help="processes (default: 12)")
    parser.add_argument("--seconds", type=float, default=450, help="begin none after (450)")
    parser.add_argument("--seq-len", type=int, help="tokens a row (default: the case's)")
    parser.add_argument("--out", type=Path, default=ROWS, help="JSON file of the rows")
    parser.add_argument("--table", action="store_true", help="print the stored rows, best first")
    options = parser.parse_args()
    print(table(stored(options.out) if options.table else measure(options)))


if __name__ == "__main__":
    main()
