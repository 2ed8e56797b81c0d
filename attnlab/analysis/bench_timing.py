"""Times of one call on an accelerator: kernels, queued, wall.

``device_ms``: sum of the times of all kernels of a call, from CUPTI, median of the calls.
``queued_ms``: time a call where up to ten wait in the queue: kernels, gaps between, host hidden.
``wall_ms``: host clock round one call until its results are there, median.
All in milliseconds. A call is timed in several rounds, between which its peers are, so that they
all see the card as warm; what counts are the medians of the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Kernels = Sequence[tuple[str, float]]  # name and milliseconds of every kernel of one call
SECONDS, LEAST, MOST, QUEUE, TRACED = 0.2, 5, 100, 10, 10  # of a round
NAME = 96  # characters of a kernel's name that are kept


@dataclasses.dataclass(frozen=True)
class Times:
    """Measured times of one call. ``kernels``: name to milliseconds a call. ``method``: how
    ``device_ms`` was taken, or why it is None. ``calls``: timed calls behind ``wall_ms``."""

    device_ms: float | None
    queued_ms: float
    wall_ms: float
    kernels: dict[str, float]
    method: str
    calls: int

    def row(self) -> dict[str, Any]:
        """The part of a result row that holds these times."""
        return dataclasses.asdict(self)


def take(
    call: Callable[[], Any], wait: Callable[[Any], Any],
    kernels: Callable[[int], tuple[list[Kernels], str]],
) -> Times:
    """All times of ``call``, which is warm.

    Args:
        call: dispatches once and returns its results. wait: blocks until results are there.
        kernels: given a count, the kernels of each of so many calls and how they were taken; an
            empty list where the platform tells none.
    """
    wait(call())
    started = time.perf_counter()
    wait(call())
    once = time.perf_counter() - started
    calls = int(min(max(SECONDS / max(once, 1e-6), LEAST), MOST))
    walls = []
    for _ in range(calls):
        started = time.perf_counter()
        wait(call())
        walls.append(time.perf_counter() - started)
    queues = []
    queue = min(QUEUE, calls)
    for _ in range(calls // queue):
        started = time.perf_counter()
        for _ in range(queue):
            results = call()
        wait(results)
        queues.append((time.perf_counter() - started) / queue)
    traced, method = kernels(min(calls, TRACED))
    device, by_name = summed(traced)
    return Times(
        device, statistics.median(queues) * 1e3, statistics.median(walls) * 1e3, by_name, method,
        calls,
    )


def merged(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of several rounds, each as ``Times.row()``: medians, the kernels of the middle round,
    and ``rounds_ms``, the time of each."""
    def time_of(row):
        return row["queued_ms"] if row["device_ms"] is None else row["device_ms"]

    middle = sorted(rounds, key=time_of)[len(rounds) // 2]
    found = {}
    for name in ("device_ms", "queued_ms", "wall_ms"):
        known = [row[name] for row in rounds if row[name] is not None]
        found[name] = statistics.median(known) if known else None
    return middle | found | {
        "calls": sum(row["calls"] for row in rounds), "rounds_ms": [time_of(row) for row in rounds]
    }


def summed(calls: Sequence[Kernels]) -> tuple[float | None, dict[str, float]]:
    """Median over calls of the sum of kernel times, and the same for each kernel name."""
    if not calls:
        return None, {}
    totals = statistics.median(sum(ms for _, ms in kernels) for kernels in calls)
    names = dict.fromkeys(name for kernels in calls for name, _ in kernels)
    by_name: dict[str, float] = {}
    for name in names:
        ms = statistics.median(
            sum(ms for other, ms in kernels if other == name) for kernels in calls
        )
        by_name[name[:NAME]] = by_name.get(name[:NAME], 0.0) + ms
    return totals, dict(sorted(by_name.items(), key=lambda item: -item[1]))


def jax_kernels(function: Any, args: Sequence[Any], count: int) -> tuple[list[Kernels], str]:
    """Kernels of ``count`` calls of a jitted function, by the CUPTI profiler of jax's Mosaic GPU.

    It sees kernels, not copies and memsets.
    """
    import jax

    if jax.default_backend() not in ("gpu", "cuda"):
        return [], f"no kernel times on {jax.default_backend()}"
    try:
        from jax.experimental.mosaic.gpu import profiler

        try:
            found = profiler.measure(function, aggregate=False, iterations=count)(*args)[1]
            calls = [found] if count == 1 else found
        except RuntimeError:  # kernels of neighbouring calls cannot be told apart: one at a time
            single = profiler.measure(function, aggregate=False)
            calls = [single(*args)[1] for _ in range(LEAST)]
    except (ImportError, AttributeError, RuntimeError) as error:
        calls, reason = _traced(function, args, count)
        return calls, f"{reason} (CUPTI profiler: {str(error).splitlines()[0]})"
    if not calls or not all(calls):
        return [], "the CUPTI profiler saw no kernel"
    return calls, "CUPTI, kernels"


def _traced(function: Any, args: Sequence[Any], count: int) -> tuple[list[Kernels], str]:
    """The same from a trace of jax.profiler, which sees copies and memsets too."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                results = function(*args)
            jax.block_until_ready(results)
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        planes = [p for f in files for p in jax.profiler.ProfileData.from_file(str(f)).planes]
    return events_of(planes, count)


def events_of(planes: Sequence[Any], count: int) -> tuple[list[Kernels], str]:
    """The events on the streams of a GPU, cut into ``count`` calls."""
    streams = [
        line for plane in planes if plane.name.startswith("/device:GPU")
        for line in plane.lines if line.name.startswith("Stream")
    ]
    events = [(e.start_ns, e.name, e.duration_ns / 1e6) for line in streams for e in line.events]
    return cut([(name, ms) for _, name, ms in sorted(events)], count, "jax.profiler")


def torch_kernels(call: Callable[[], Any], count: int) -> tuple[list[Kernels], str]:
    """Kernels, copies and memsets of ``count`` calls by torch.profiler (CUPTI too)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return [], "no kernel times on cpu"
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return split(json.loads(path.read_text()), count)


def split(trace: dict[str, Any], count: int) -> tuple[list[Kernels], str]:
    """The device events of a Chrome trace, cut into ``count`` calls."""
    kinds = ("kernel", "gpu_memset", "gpu_memcpy")
    events = [e for e in trace.get("traceEvents", ()) if e.get("cat") in kinds]
    events.sort(key=lambda e: e["ts"])
    return cut([(e["name"], e["dur"] / 1e3) for e in events], count, "torch.profiler")


def cut(events: list[tuple[str, float]], count: int, method: str) -> tuple[list[Kernels], str]:
    """Device events in order of time as ``count`` calls of equal length, or else their mean."""
    if not events:
        return [], f"{method} saw no kernel"
    each, left = divmod(len(events), count)
    if left:
        return [[(name, ms / count) for name, ms in events]], f"{method}, mean of {count} calls"
    calls = [events[i : i + each] for i in range(0, len(events), each)]
    return calls, f"{method}, kernels, copies and memsets"
