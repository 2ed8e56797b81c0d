"""``attnlab bench``: timings that are compared with a reference before they are taken.

``bench train`` times the real training step of a recipe: device time a step with the batch already
in place, and the whole loop (loader, placement, dispatch, metrics) beside it. MFU counts visible
attention pairs only, backward = 2 x forward, no recomputation.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from attnlab.core.errors import ConfigError

CHECKED = ("jax", "jaxlib", "flax", "optax", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``attnlab bench train``."""
    parser.add_argument("--recipe", default="350m", help="recipe to time (default: 350m)")
    parser.add_argument("--batch", type=int, default=8, help="rows a step (default: 8)")
    parser.add_argument("--seq-len", type=int, help="tokens a row (default: the recipe's)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=4, help="untimed steps (default: 4)")
    parser.add_argument("--impl", help="attention implementation (default: the first that serves)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="sets",
        help="change a recipe field, as in train",
    )
    parser.add_argument("--out", help="append the result row to this JSON file")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark; prints a table and one JSON line."""
    for flag, value, least in (
        ("batch", args.batch, 1), ("steps", args.steps, 1), ("warmup", args.warmup, 0)
    ):
        if value < least:
            rule = f"must be at least {least}"
            raise ConfigError(f"--{flag} {value}", rule, f"use {least} or more")
    if args.out:
        stored(Path(args.out))  # a file that cannot take the row is no use after the measurement
    row = train(
        args.recipe, args.batch, args.seq_len, args.steps, args.warmup, args.impl, args.sets
    )
    row["command"] = "attnlab " + " ".join(sys.argv[1:])
    for name in ("step_ms", "loop_ms", "host_ms", "tokens_per_s", "tflops_per_s", "mfu",
                 "host_overhead", "roofline_ms", "peak_memory_gib"):
        value = row[name]
        print(f"{name:>16}  {'-' if value is None else f'{value:.4g}'}")
    print(json.dumps(row))
    if args.out:
        append(Path(args.out), row)
    return 0


def train(
    name: str, batch: int, seq_len: int | None = None, steps: int = 20, warmup: int = 4,
    impl: str | None = None, sets: list[str] | None = None,
) -> dict[str, Any]:
    """Time ``steps`` training steps of recipe ``name``; the row to store.

    ``step_ms``: median device-bound time of a step, batch in place. ``loop_ms``: mean time of a
    step of the real loop. ``host_ms``: time the host needs to feed and dispatch one.
    ``host_overhead = loop_ms / step_ms - 1``. ``roofline_ms``: useful FLOPs at the device's peak.
    """
    import jax

    from attnlab.core import dispatch
    from attnlab.parallel.feed import place
    from attnlab.train import metrics
    from attnlab.train import recipe as recipes
    from attnlab.train.data import make_loader
    from attnlab.train.setup import make_trainer, read_data

    changes = [f"train.batch={batch}", "data.document_mask=False", *(sets or [])]
    if seq_len is not None:
        changes.append(f"train.seq_len={seq_len}")
    if impl:
        changes.append(f"train.impl={impl}")
    recipe = recipes.load(name, changes)
    c = recipe.train
    error = _check_attention(recipe)
    trainer = make_trainer(recipe)
    rows = read_data(recipe)[1]
    loader = make_loader(rows, batch=c.batch, seed=0)
    state = trainer.init(0)
    fixed = place(next(loader), trainer.batch_sharding)
    with dispatch.recording() as traced:
        started = time.perf_counter()
        state, values = trainer.step(state, fixed)
        first_loss = float(values["loss"])
        compile_s = time.perf_counter() - started
    for _ in range(warmup):
        state, values = trainer.step(state, fixed)
    jax.block_until_ready(values)

    state, step_s = _back_to_back(trainer, state, fixed, steps)
    state, loop_s, host_s = _loop(trainer, state, loader, steps, place)
    rates = metrics.rates(recipe.model, c.batch, c.seq_len, step_s)
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    flops = metrics.step_flops(recipe.model, c.batch, c.seq_len)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "bench": "train", "recipe": name, "batch": c.batch, "seq_len": c.seq_len,
        "params": recipe.model.param_count(), "remat": recipe.model.remat,
        "attention": sorted({impl for op, _, impl in traced if op == "attention"}),
        "attention_error": error, "first_loss": first_loss,
        "step_ms": step_s * 1e3, "loop_ms": loop_s * 1e3, "host_ms": host_s * 1e3,
        "host_overhead": loop_s / step_s - 1, **rates,
        "roofline_ms": None if peak is None else flops / peak / jax.device_count() * 1e3,
        "peak_memory_gib": memory.get("peak_bytes_in_use", 0) / 2**30 or None,
        "compile_s": compile_s, **stamp(),
    }


def _back_to_back(trainer, state, batch, steps: int):
    """Median over groups of four steps that are dispatched together and waited for once."""
    import jax

    times = []
    for _ in range(max(1, steps // 4)):
        started = time.perf_counter()
        for _ in range(4):
            state, values = trainer.step(state, batch)
        jax.block_until_ready(values)
        times.append((time.perf_counter() - started) / 4)
    return state, statistics.median(times)


def _loop(trainer, state, loader, steps: int, place):
    """The loop as training runs it: metrics of step i - 2 are read while step i works."""
    import jax

    host, pending = [], []
    started = time.perf_counter()
    for _ in range(steps):
        begin = time.perf_counter()
        batch = place(next(loader), trainer.batch_sharding)
        state, values = trainer.step(state, batch)
        host.append(time.perf_counter() - begin)
        pending.append(values)
        if len(pending) > 2:
            jax.device_get(pending.pop(0))
    jax.block_until_ready(values)
    return state, (time.perf_counter() - started) / steps, statistics.median(host)


def _check_attention(recipe) -> float:
    """Compare the attention this recipe uses with the dense oracle before timing anything.

    Returns the relative error of a forward pass at T = 256 in the recipe's dtype; raises when it is
    more than twice the rounding of that dtype allows.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnlab.core.errors import ImplementationError
    from attnlab.core.types import Seq

    worst = 0.0
    for config in recipe.model.period:
        layer = config.build(nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(1), (2, 256, config.dim))
        seq = Seq.full(2, 256)
        fast, slow = (
            jax.jit(lambda x, m=layer, s=seq, i=impl: m(x, s, impl=i).y)(x)
            for impl in (recipe.train.impl, "reference")
        )
        fast, slow = fast.astype(jnp.float32), slow.astype(jnp.float32)
        error = float(jnp.linalg.norm(fast - slow) / jnp.linalg.norm(slow))
        limit = 2e-2 if config.precision.compute == "bfloat16" else 1e-4
        if not error <= limit:
            raise ImplementationError(
                f"attention error {error:.2e} of {type(config).__name__}",
                f"is above {limit:.0e} against the reference: not timed", "report it",
            )
        worst = max(worst, error)
    return worst


def stamp() -> dict[str, Any]:
    """Versions, device and date: stands in every result row."""
    import jax

    return {
        "versions": {n: importlib.metadata.version(n) for n in CHECKED},
        "device": jax.devices()[0].device_kind, "device_count": jax.device_count(),
        "date": datetime.date.today().isoformat(),
    }


def stored(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON list on disk, none where there is no file."""
    try:
        rows = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        rule = f"cannot be read as JSON ({error})"
        raise ConfigError(f"--out {path}", rule, "name another file") from None
    if not isinstance(rows, list):
        raise ConfigError(f"--out {path}", "is not a JSON list of rows", "name another file")
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to a JSON list on disk."""
    save(path, [*stored(path), row])


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON list, one row a line; an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    part.replace(path)
