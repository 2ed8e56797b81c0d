"""A grid of variants and tasks: models of one size, cells that are kept, and what they say.

    grid = Grid(variants=("gqa", "mla"), tasks=("mqar", "induction"))
    rows = run(grid, Path("compare"))                  # goes on where it was interrupted
    print(markdown(summary(rows, baseline="gqa")))

A cell is one variant on one task, all rates and seeds at once (``fit``); its row is written before
the next begins, so a kill loses at most one cell. A folder holds one grid.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attnlab import tasks
from attnlab.analysis import listing
from attnlab.analysis.bench import save, stamp, stored
from attnlab.compare.fit import Budget, fit
from attnlab.core import registry
from attnlab.core.config import to_dict
from attnlab.core.errors import ConfigError
from attnlab.models.decoder import DecoderConfig
from attnlab.tasks.task import require_positive

Row = dict[str, Any]
LEARNED = 0.99


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What is compared, and what all have in common.

    Args:
        variants, tasks: names. seeds: how many. rates: peak learning rates; each variant is judged
            at its best. dim, heads, layers, mlp_dim: of the decoders; half as many key/value heads
            where a variant has them. short_conv: taps of the convolution in front of every mixer, 0
            for none: without it softmax attention does not leave the plateau of recall tasks.
        match: "parameters": the MLP of smaller models is widened until all have as many; "none".
    """

    variants: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: int = 3
    rates: tuple[float, ...] = (1e-3, 3e-3)
    budget: Budget = dataclasses.field(default_factory=Budget)
    dim: int = 64
    heads: int = 2
    layers: int = 2
    mlp_dim: int = 64
    short_conv: int = 3
    match: Literal["parameters", "none"] = "parameters"

    def __post_init__(self):
        for name in ("variants", "tasks", "rates"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                rule = "must be some, each once"
                raise ConfigError(f"{name} = {given}", rule, "name one or more")
        require_positive(self, "seeds", "dim", "heads", "layers", "mlp_dim")
        if self.dim % self.heads:
            raise ConfigError(
                f"dim = {self.dim}", f"must be a multiple of heads = {self.heads}",
                f"use {self.dim // self.heads * self.heads or self.heads}",
            )
        if self.match not in ("parameters", "none"):
            raise ConfigError(
                f"match = {self.match!r}", "is not known", "use 'parameters' or 'none'"
            )
        for name in self.variants:
            registry.get(name)
        for name in self.tasks:
            tasks.get(name)

    def models(self, task: str) -> dict[str, DecoderConfig]:
        """The decoder of every variant for a task."""
        shape = listing.Shape(
            dim=self.dim, num_heads=self.heads, num_kv_heads=max(1, self.heads // 2),
            head_dim=self.dim // self.heads,
        )
        made = {
            name: DecoderConfig(
                vocab_size=tasks.get(task).vocab_size, period=(listing.sized(name, shape),),
                repeats=self.layers, mlp_dim=self.mlp_dim, short_conv=self.short_conv,
            )
            for name in self.variants
        }
        if self.match == "none":
            return made
        most = max(model.param_count() for model in made.values())
        unit = 3 * self.dim * self.layers  # parameters of a hidden unit
        return {
            name: dataclasses.replace(
                model, mlp_dim=self.mlp_dim + round((most - model.param_count()) / unit)
            )
            for name, model in made.items()
        }


def run(grid: Grid, folder: Path, say: Callable[[str], None] = print) -> list[Row]:
    """Train the cells that ``folder`` lacks, and return the rows of all.

    Raises:
        ConfigError: the folder holds another grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec, wanted = folder / "grid.json", json.loads(json.dumps(to_dict(grid)))
    if held := stored(spec):
        other = sorted(n for n in wanted if held[0].get(n) != wanted[n])
        if other:
            rule = f"holds another grid ({', '.join(other)} differ)"
            raise ConfigError(f"{folder}", rule, "use another folder")
    else:
        save(spec, [wanted])
    out = folder / "results.json"
    rows = stored(out)
    done = {(row["task"], row["variant"]) for row in rows}
    left = [(t, v) for t in grid.tasks for v in grid.variants if (t, v) not in done]
    if done:
        say(f"{len(done)} cells are there, {len(left)} are left")
    started, trained = time.monotonic(), 0
    for task, variant in left:
        model = grid.models(task)[variant]
        begun = time.monotonic()
        found = fit(
            model, tasks.get(task), grid.budget, rates=grid.rates, seeds=range(grid.seeds)
        )
        length = tasks.get(task).seq_len
        rows.append({
            "task": task, "variant": variant, "parameters": model.param_count(),
            "mlp_dim": model.mlp_dim, "flops_per_token": 3 * model.flops(length) / length,
            "cache_bytes_per_token": model.cache_bytes(2) - model.cache_bytes(1),
            "rates": list(grid.rates), "steps": found.steps.tolist(),
            "loss": found.loss.tolist(), "accuracy": found.accuracy.tolist(),
            "groups": {name: x.tolist() for name, x in found.groups.items()},
            "seconds": round(time.monotonic() - begun, 1), **stamp(),
        })
        save(out, rows)
        trained += 1
        rest = (time.monotonic() - started) / trained * (len(left) - trained)
        say(f"{task} {variant}: {best(rows[-1])['mean']:.3f}, {rows[-1]['seconds']:.0f} s"
            + (f"; about {rest / 60:.1f} min left" if trained < len(left) else ""))
    return sorted(rows, key=lambda row: (
        grid.tasks.index(row["task"]), grid.variants.index(row["variant"])
    ))


def best(row: Row) -> dict[str, Any]:
    """A row at its best rate, by the mean of the accuracy at the end, then of the loss: rate, mean,
    standard deviation over seeds, accuracies, and the steps after which each seed had learned."""
    accuracy, loss = np.asarray(row["accuracy"]), np.asarray(row["loss"])
    ends = accuracy[..., -1].mean(1), -loss[..., -1].mean(1)
    at = max(range(len(accuracy)), key=lambda i: (ends[0][i], ends[1][i]))
    seeds = accuracy[at, :, -1]
    learned = [
        next((step for step, x in zip(row["steps"], curve) if x >= LEARNED), None)
        for curve in accuracy[at]
    ]
    return {
        "rate": row["rates"][at], "mean": float(seeds.mean()), "accuracies": seeds.tolist(),
        "std": float(seeds.std(ddof=1)) if len(seeds) > 1 else None, "learned": learned,
    }


def summary(rows: Sequence[Row], baseline: str) -> list[dict[str, Any]]:
    """What the table says: a line a cell, with ``p`` of the difference from the baseline on the
    same task (Welch's t-test over seeds; None for the baseline, one seed, or no spread at all)."""
    from scipy import stats

    mine = {row["task"]: best(row) for row in rows if row["variant"] == baseline}
    if len(mine) != len({row["task"] for row in rows}):
        raise ConfigError(f"baseline = {baseline!r}", "was not trained", "name one of the variants")
    lines = []
    for row in rows:
        found, base, p = best(row), mine[row["task"]], None
        spread = (found["std"] or 0) + (base["std"] or 0)
        if row["variant"] != baseline and found["std"] is not None and spread > 0:
            with warnings.catch_warnings():  # one of the two may have no spread: that is no fault
                warnings.simplefilter("ignore", RuntimeWarning)
                test = stats.ttest_ind(found["accuracies"], base["accuracies"], equal_var=False)
            p = float(test.pvalue)  # type: ignore
        chance = tasks.get(row["task"]).chance
        lines.append({**{n: row[n] for n in (
            "task", "variant", "parameters", "flops_per_token", "cache_bytes_per_token", "seconds",
        )}, **found, "chance": chance, "p": p})
    return lines


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The lines of ``summary`` as a table."""
    head = ("task", "variant", "accuracy", "steps to 0.99", "p", "best rate", "parameters",
            "training MFLOP a token", "cache B a token", "s")
    table = [head, ("---",) * len(head)]
    for line in lines:
        spread = "" if line["std"] is None else f" ± {line['std']:.3f}"
        late = [step for step in line["learned"] if step is not None]
        learned = f"{int(np.median(late))} ({len(late)}/{len(line['learned'])})" if late else "-"
        table.append((
            line["task"], line["variant"], f"{line['mean']:.3f}{spread}", learned,
            "-" if line["p"] is None else f"{line['p']:.2g}", f"{line['rate']:g}",
            f"{line['parameters']:,}", f"{line['flops_per_token'] / 1e6:.2f}",
            f"{line['cache_bytes_per_token']:,}", f"{line['seconds']:.0f}",
        ))
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def note(grid: Grid) -> str:
    """What was held the same, in words."""
    b = grid.budget
    matched = {
        "parameters": "parameters matched by the width of the MLP", "none": "parameters not matched"
    }[grid.match]
    conv = f"a convolution over {grid.short_conv} tokens in front of every mixer"
    return (
        f"{grid.layers} layers, D = {grid.dim}, {grid.heads} heads; {b.steps:,} steps of {b.batch} "
        f"rows, the same for all; {matched}; {conv if grid.short_conv else 'no convolution'}; "
        f"{grid.seeds} seeds (mean ± standard deviation), each variant at its best of rates "
        f"{', '.join(f'{rate:g}' for rate in grid.rates)}; p: Welch's t-test against "
        f"{grid.variants[0]}."
    )
