"""``attnlab bench attention``: the attention op against its peers on one GPU, in one run.

A cell is (case, implementation, direction). Every cell is compared with dense fp32 attention on the
same data at the same length before it is timed; what disagrees gets a row with the reason and no
time, and so does what refuses, fails or never ends. The implementations of one call are timed in
turn, several rounds of it: a card that gets warmer is slower for all of them. With ``--out`` rows
are stored as they come, one a cell and device, and a cell is skipped while device, versions and the
code behind it stand.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attnlab.analysis import bench_cases, bench_report
from attnlab.analysis.bench import save, stored
from attnlab.analysis.bench_cases import BOTH, FORWARD, OURS, Case, Decode
from attnlab.analysis.bench_timing import merged
from attnlab.analysis.bench_worker import Worker
from attnlab.core.errors import ConfigError, UnsupportedError

# Implementations, in the order in which they are measured, and the process of each.
KINDS = {
    "gpu": "jax", "flex": "torch", "flex-exp": "torch", "torch-cudnn": "torch", "cudnn": "jax",
    "tokamax": "jax", "gpu-wide": "jax", "flex-fa4": "torch", "triton": "jax", "xla": "jax",
    "flex-tuned": "torch",
}
ON_REQUEST = ("flex-tuned",)  # minutes of autotuning a cell
CELL_S = 180.0  # seconds a cell may take: its compilation, comparison and timing
LEAST_S = 40.0  # seconds that must be left to begin a group of them
ROUNDS = 3  # of timing, one implementation after the other
CPU_LENGTH = 2048  # longest rows without a GPU
Cell = tuple[Case | Decode, str, str]

_PACKAGE = Path(__file__).resolve().parent.parent
_MEASURE = ("analysis/bench_cases.py", "analysis/bench_oracle.py", "analysis/bench_timing.py")
_JAX = (*_MEASURE, "analysis/bench_jax.py", "ops/attention/__init__.py", "ops/attention/vendor.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnlab bench attention`` where it measures."""
    group = parser.add_argument_group("measured on this device")
    names = ", ".join(case.name for case in bench_cases.CASES)
    impls = ", ".join(KINDS)
    group.add_argument("--case", help=f"comma-separated (default: all): {names}")
    group.add_argument(
        "--impl", help=f"comma-separated (default: all but {', '.join(ON_REQUEST)}): {impls}; with "
        "--target: implementations with block sizes on it",
    )
    group.add_argument("--seq-len", type=int, help="tokens a row (default: the case's)")
    group.add_argument("--out", metavar="FILE", help="store the rows in this JSON file")
    group.add_argument(
        "--direction", choices=["fwd", "bwd", "both"], default="both",
        help="fwd: forward alone; bwd: forward + backward in one call (default: both)",
    )
    group.add_argument(
        "--seconds", type=float, metavar="LIMIT", help="stop before so many seconds have passed"
    )
    group.add_argument("--again", action="store_true", help="measure cells that --out holds too")


def main(args: argparse.Namespace) -> int:
    """Measure the chosen cells; prints a line a cell, then the table of those measured now.

    Where none was left to measure, the table holds all that were chosen.
    """
    if args.seconds is not None and not args.seconds > 0:
        raise ConfigError(f"--seconds {args.seconds:g}", "must be positive", "use 480")
    if args.out:
        stored(Path(args.out))  # a file that cannot take rows is no use after the measurement
    cells = chosen(args.case, args.impl, args.direction, args.seq_len)
    command = ["attnlab bench attention"]
    for flag in ("case", "impl", "seq_len"):
        if getattr(args, flag) is not None:
            command.append(f"--{flag.replace('_', '-')} {getattr(args, flag)}")
    if args.direction != "both":
        command.append(f"--direction {args.direction}")
    kinds = dict.fromkeys(KINDS[impl] for _, impl, _ in cells)
    workers = {kind: Worker(kind) for kind in {"jax": None, **kinds}}
    out = None if args.out is None else Path(args.out)
    say = functools.partial(print, flush=True)  # a line a cell, also where the run is cut off
    rows, done, left = run(cells, workers, out, args.seconds, args.again, " ".join(command), say)
    shown = done or cells  # the end of a long output is what people see
    print(bench_report.table(rows, [(case.name, impl, way, case.S) for case, impl, way in shown]))
    if left:
        print(f"\nnot measured within {args.seconds:g} s ({len(left)} cells; run it again):")
        print("  " + ", ".join(f"{case.name} {way} {impl}" for case, impl, way in left))
    return 0


def chosen(
    case: str | None, impl: str | None, direction: str = "both", seq_len: int | None = None
) -> list[Cell]:
    """The cells of comma-separated cases and implementations, peers beside ours case by case.

    Raises:
        ConfigError: an unknown name, no cell left, or a length that is no multiple of 128.
    """
    usual = [name for name in KINDS if name not in ON_REQUEST]
    names = usual if impl is None else list(dict.fromkeys(impl.split(",")))
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"--impl {name}", "is not timed here", f"use {', '.join(KINDS)}")
    ways = {"fwd": (FORWARD,), "bwd": (BOTH,), "both": (FORWARD, BOTH)}[direction]
    cells: list[Cell] = [
        (one, name, way)
        for one in bench_cases.chosen(case, seq_len)
        for way in ways
        if way in one.directions
        for name in names
        if not isinstance(one, Decode) or (name in OURS and name != "gpu-wide")
        if name != "flex-exp" or getattr(one, "mod", None) == "cap"
    ]
    if not cells:
        raise ConfigError(
            f"--case {case} --impl {impl} --direction {direction}", "is no cell",
            "decode and mla-576 have a forward alone, and decode is timed for ours",
        )
    return cells


def run(
    cells: list[Cell], workers: Mapping[str, Any], out: Path | None, seconds: float | None = None,
    again: bool = False, command: str = "", say: Callable[[str], None] = print,
) -> tuple[list[dict[str, Any]], list[Cell], list[Cell]]:
    """Measure ``cells``; every row afterwards, the cells measured now, and those left for later.

    Args:
        workers: "jax" (always) and, if a cell needs it, "torch"; see ``bench_worker.Worker``.
        out: JSON file of rows, or None. seconds: limit on the whole run. again: measure what is
            stored too. command: stands in every row. say: prints a line.
    """
    started = time.monotonic()
    rows = [] if out is None else stored(out)
    try:
        stamps = {kind: worker.stamp() for kind, worker in workers.items()}
        stamp = stamps["jax"].get("stamp")
        if stamp is None:
            raise UnsupportedError("jax", stamps["jax"]["reason"], "mend the installation")
        for case, _, _ in cells:
            if stamp["platform"] == "cpu" and case.S > CPU_LENGTH:
                raise ConfigError(
                    f"{case.name} with {case.S} tokens", "is timed on a GPU; jax has a CPU",
                    f"use --seq-len {CPU_LENGTH} or less to try the harness",
                )
        kept = {_key(row): row for row in rows}
        fixed = {
            "device": stamp["device"], "date": datetime.date.today().isoformat(),
            "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
        }
        todo = []
        for case, impl, way in cells:
            row = _row(case, impl, way) | {
                "versions": stamps[KINDS[impl]].get("stamp", {}).get("versions", {}),
                "revision": revision(impl), **fixed,
            }
            old = kept.get(_key(row))
            fresh = old and all(old[n] == row[n] for n in ("versions", "revision"))
            if again or not fresh:
                todo.append(((case, impl, way), row))
        groups: dict[tuple, list] = {}
        for cell, row in todo:
            groups.setdefault((cell[0], cell[2]), []).append((cell, row))
        order = list(groups.values())
        if again:  # the longest ago first, so that limited runs go round
            order.sort(key=lambda group: min(
                kept.get(_key(row), {"run": ""})["run"] for _, row in group
            ))
        say(f"{stamp['device']}: {len(todo)} cells, {len(cells) - len(todo)} stored already")
        done: list[Cell] = []
        session = _Session(workers, stamps, seconds, started)
        with tempfile.TemporaryDirectory() as folder:
            session.folder = Path(folder)
            for group in order:
                case, _, way = group[0][0]
                measured = session.group(case, way, [impl for (_, impl, _), _ in group])
                if measured is None:
                    break
                for cell, row in group:
                    row |= measured[cell[1]]
                    _derive(row, cell[0])
                    kept[_key(row)] = row
                    say(bench_report.line(row))
                done += [cell for cell, _ in group]
                if out is not None:
                    save(out, list(kept.values()))
        return list(kept.values()), done, [
            cell for group in order for cell, _ in group if cell not in done
        ]
    finally:
        for worker in workers.values():
            worker.stop()


class _Session:
    """One run: its limit, the ceilings of the device and the references of its cases."""

    def __init__(self, workers, stamps, seconds: float | None, started: float):
        self.workers, self.stamps = workers, stamps
        self.seconds, self.started = seconds, started
        self.folder = Path()
        self.ceilings: dict[str, Any] = {}
        self.references: dict[str, dict[str, Any]] = {}
        self.longest = LEAST_S
        self.cut = False  # whether the limit ended something, not its own time

    def left(self) -> float:
        return CELL_S if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def group(
        self, case: Case | Decode, way: str, impls: Sequence[str]
    ) -> dict[str, dict[str, Any]] | None:
        """The measured parts of the rows of one call; None if the limit is too near.

        First all are compiled and compared with the reference, then they are timed in turn.
        """
        if self.left() < self.longest:
            return None
        began = time.monotonic()
        if not self.ceilings:
            self.ceilings = self._ask("jax", "ceilings")
        if case.name not in self.references:
            path = str(self.folder / f"{case.name}.npz")
            self.references[case.name] = {
                "path": path, **self._ask("jax", "reference", case=case, path=path)
            }
        known = self.references[case.name]
        if self.cut:
            return None
        if "reason" in known:
            return {impl: {"reason": f"no reference: {known['reason']}"} for impl in impls}

        about = {"case": case, "direction": way, "reference": known["path"]}
        kinds = list(dict.fromkeys(KINDS[impl] for impl in impls))
        with ThreadPoolExecutor(len(kinds)) as pool:  # each has a process of its own
            parts = pool.map(
                lambda kind: self._prepared(kind, [i for i in impls if KINDS[i] == kind], about),
                kinds,
            )
            found = {impl: row for part in parts for impl, row in part.items()}
        rounds: dict[str, list[dict[str, Any]]] = {impl: [] for impl in impls}
        for _ in range(ROUNDS):
            for impl in impls:
                if not _sound(found[impl]):
                    continue
                kind = KINDS[impl]
                taken = self._ask(kind, "time", impl=impl, direction=way)
                lost = taken.pop("lost", False)
                found[impl] |= {"reason": taken.pop("reason", None)}
                rounds[impl].append(taken)
                if lost:
                    others = [i for i in impls if KINDS[i] == kind and _sound(found[i])]
                    found |= self._prepared(kind, others, about)
        if self.cut:
            return None
        self.longest = max(self.longest, time.monotonic() - began)
        rates = {n: self.ceilings.get(n) for n in ("matmul_tflops", "copy_gb_s")}
        return {
            impl: rates | {"reason": None} | row | (merged(rounds[impl]) if _sound(row) else {})
            for impl, row in found.items()
        }

    def _prepared(
        self, kind: str, impls: Sequence[str], about: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Rows of implementations that are ready in the process of ``kind``, or have a reason."""
        if "reason" in self.stamps[kind]:
            return {impl: {"reason": self.stamps[kind]["reason"]} for impl in impls}
        found: dict[str, dict[str, Any]] = {}
        waiting = list(impls)
        while waiting:
            impl = waiting.pop(0)
            row = self._ask(kind, "prepare", impl=impl, **about)
            if row.pop("lost", False):  # and with the process those that were ready
                waiting += [i for i in found if _sound(found[i])]
            found[impl] = row
        return found

    def _ask(self, kind: str, method: str, **arguments: Any) -> dict[str, Any]:
        reply = self.workers[kind].ask(method, max(min(CELL_S, self.left()), 1.0), **arguments)
        self.cut |= bool(reply.get("lost")) and self.left() < 1
        return reply


def _sound(row: Mapping[str, Any]) -> bool:
    return row.get("reason") is None


def _row(case: Case | Decode, impl: str, way: str) -> dict[str, Any]:
    shape = {name: getattr(case, name) for name in ("B", "S", "N", "K", "H", "V")}
    return {"bench": "attention", "case": case.name, "impl": impl, "direction": way, **shape,
            "dtype": "bfloat16"}


def _key(row: Mapping[str, Any]) -> tuple:
    return tuple(row[name] for name in ("case", "impl", "direction", "S", "device"))


def _derive(row: dict[str, Any], case: Case | Decode) -> None:
    """Rates of a timed row: TFLOP/s of visible pairs, GB/s of what must move, the roofline."""
    ms = bench_report.ms(row)
    if ms is None:
        return
    row["flops"] = case.flops(row["direction"], row["pairs"])
    row["bytes"] = case.bytes(row["direction"])
    row["tflops"], row["gb_s"] = row["flops"] / ms / 1e9, row["bytes"] / ms / 1e6
    from attnlab.train.metrics import peak_flops

    peak, copy = peak_flops(row["device"]), row["copy_gb_s"]
    bounds = [row["flops"] / peak * 1e3] if peak else []
    bounds += [row["bytes"] / copy / 1e6] if copy else []
    row["roofline_ms"] = max(bounds, default=None)


@functools.cache
def revision(impl: str) -> str:
    """A digest of the code that decides an implementation's time."""
    if KINDS[impl] == "torch":
        files = [_PACKAGE / name for name in (*_MEASURE, "analysis/peers.py")]
    else:
        files = [_PACKAGE / name for name in _JAX]
    if impl in OURS:
        files.append(_PACKAGE / "analysis/bench_decode.py")
        files += [f for part in ("core", "ops") for f in (_PACKAGE / part).rglob("*.py")]
        files += (_PACKAGE / "data" / "tuned").rglob("*.json")
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
