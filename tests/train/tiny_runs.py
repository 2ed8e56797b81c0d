"""A run that takes a second: the command line, and what it left behind."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PYTHON = sys.executable
STEPS = 12
COMPARED = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "val_bits_per_byte", "skipped")


def corpus(folder: pathlib.Path) -> list[str]:
    """``--data`` and ``--val-data`` of a small text."""
    sentence = "line {} of the text: the quick brown fox jumps over {} dogs"
    lines = [sentence.format(i, i * i) for i in range(400)]
    for name, text in (("train.txt", lines), ("val.txt", lines[::-7])):
        (folder / name).write_text("\n".join(text) + "\n")
    return ["--data", str(folder / "train.txt"), "--val-data", str(folder / "val.txt")]


def command(data: list[str], out: Any, *more: str, steps: int = STEPS) -> list[str]:
    """Arguments of ``attnlab``."""
    return [
        "train", "quickstart", "--steps", str(steps), "--batch", "4", "--seq-len", "16",
        "--set", "model.repeats=1", "--set", "model.mlp_dim=16", "--set", "model.period.0.dim=16",
        "--set", "model.period.0.num_heads=2", "--set", "model.period.0.head_dim=8",
        "--set", "train.sample_tokens=0", "--set", "train.eval_rows=8", "--set",
        "optimizer.warmup=4", "--eval-every", "6", "--checkpoint-every", "4", "--log-every", "1",
        "--plain", "--out", str(out), *data, *more,
    ]


def rows(out: Any) -> list[dict]:
    """The rows of metrics.jsonl, strictly parsed."""
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    text = (pathlib.Path(out) / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def curve(out: Any) -> list[tuple]:
    """What must be the same in two runs: every number that is not a speed."""
    return [tuple(row.get(name) for name in COMPARED) for row in rows(out)]


def checksums(out: Any, step: int = STEPS) -> dict:
    """The checksum of every array of a checkpoint."""
    path = pathlib.Path(out) / "checkpoints" / str(step) / "meta" / "metadata"
    return json.loads(path.read_text())["checksums"]


def saved(out: Any) -> list[int]:
    """Steps of the complete checkpoints."""
    folder = pathlib.Path(out) / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a process of its own. Such processes share compiled programs on disk with each other, not
    with the tests' own: some are killed, maybe while they write an entry."""
    import jax

    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    cache = ROOT / ".pytest_cache" / f"jax-{jax.__version__}" / f"runs-{worker}"
    flags = "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **more,
    }
