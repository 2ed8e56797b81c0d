"""Start ``attnlab`` as several processes of one job on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import tiny_runs


def start(argv: list[str], count: int = 2, devices: int = 2) -> list[subprocess.Popen]:
    """One process each, joined through the variables that a cluster would set."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "attnlab", *argv], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=tiny_runs.environment(
                devices, JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(i),
            ),
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen], limit: float = 240) -> tuple[list[int], list[str]]:
    """``(exit codes, outputs)``; whoever is still there after ``limit`` seconds is killed."""
    deadline, texts = time.monotonic() + limit, []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0] + "\n(killed by the test: it did not end)"
        texts.append(text)
    return [process.returncode for process in processes], texts


def wait_for_row(out, step: int, processes, limit: float = 240) -> None:
    """Return once ``step`` is in metrics.jsonl."""
    deadline = time.monotonic() + limit
    path = out / "metrics.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= step):
        assert all(p.poll() is None for p in processes), finish(processes, 5)
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)
