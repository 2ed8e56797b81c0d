"""The grid: matched models, cells that are kept, the table, the command."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from attnlab import cli
from attnlab.compare import grid as grids
from attnlab.compare.fit import Budget, Fitted
from attnlab.compare.grid import Grid, best, markdown, run, summary
from attnlab.core.errors import ConfigError
from attnlab.core.registry import VARIANTS

SMALL = Grid(
    variants=("gqa", "cca"), tasks=("induction", "parity"), seeds=2, rates=(1e-3, 1e-2), dim=16,
    mlp_dim=16, budget=Budget(steps=4, batch=2, points=2, rows=16),
)


@pytest.fixture
def trained(monkeypatch):
    """Cells trained, in order, with curves that depend on the variant alone."""
    seen = []

    def fake(model, task, budget, *, rates, seeds):
        seen.append((type(task).__name__, type(model.period[0]).__name__))
        high = 0.5 if "CCA" in seen[-1][1] else 0.25
        accuracy = np.full((len(rates), len(seeds), 2), high)
        accuracy[1, :, 1] += [0.25 + 0.01 * seed for seed in seeds]
        accuracy[1, 0, 1] = 1.0
        return Fitted(np.array([2, 4]), 1 - accuracy, accuracy, {})

    monkeypatch.setattr(grids, "fit", fake)
    return seen


def test_models_have_as_many_parameters():
    grid = dataclasses.replace(SMALL, variants=tuple(VARIANTS), dim=64, mlp_dim=64)
    counts = {n: m.param_count() for n, m in grid.models("induction").items()}
    unit = 3 * 64 * grid.layers
    assert max(counts.values()) - min(counts.values()) <= unit, "a hidden unit apart at most"
    loose = dataclasses.replace(grid, match="none").models("induction")
    assert {m.mlp_dim for m in loose.values()} == {64}
    assert max(counts.values()) >= max(m.param_count() for m in loose.values())
    assert {m.short_conv for m in loose.values()} == {3}


def test_cells_are_kept(trained, tmp_path):
    said = []
    rows = run(SMALL, tmp_path, said.append)
    assert len(trained) == 4 and len(rows) == 4 and "min left" in said[0]
    again = run(SMALL, tmp_path, said.append)
    assert len(trained) == 4 and again == rows and said[-1] == "4 cells are there, 0 are left"
    out = tmp_path / "results.json"
    kept = [row for row in json.loads(out.read_text()) if row["variant"] != "cca"]
    out.write_text(json.dumps(kept))
    rest = run(SMALL, tmp_path, said.append)
    assert len(trained) == 6 and [(r["task"], r["variant"]) for r in rest] == [
        ("induction", "gqa"), ("induction", "cca"), ("parity", "gqa"), ("parity", "cca"),
    ]


def test_a_folder_holds_one_grid(trained, tmp_path):
    run(SMALL, tmp_path, lambda line: None)
    for change in (dict(seeds=3), dict(budget=Budget(steps=4, batch=3, points=2, rows=16))):
        with pytest.raises(ConfigError, match="holds another grid"):
            run(dataclasses.replace(SMALL, **change), tmp_path)
    assert len(trained) == 4
    (tmp_path / "results.json").write_text("[{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        run(SMALL, tmp_path)


def test_the_best_rate_and_significance(trained, tmp_path):
    rows = run(SMALL, tmp_path, lambda line: None)
    found = best(rows[1])
    assert found["rate"] == 1e-2 and found["accuracies"] == [1.0, 0.76]
    assert found["mean"] == pytest.approx(0.88) and found["learned"] == [4, None]
    assert found["std"] == pytest.approx(np.std([1.0, 0.76], ddof=1))
    lines = summary(rows, "gqa")
    assert lines[0]["p"] is None and 0 < lines[1]["p"] < 1
    a, b = np.array([1.0, 0.76]), np.array([1.0, 0.51])
    t = (a.mean() - b.mean()) / np.sqrt(a.var(ddof=1) / 2 + b.var(ddof=1) / 2)
    assert lines[1]["p"] > 0.3 and abs(t) < 1, "two seeds so far apart show nothing"
    text = markdown(lines)
    assert len(text.splitlines()) == 2 + 4 and "| 0.880 ± 0.170 | 4 (1/2) |" in text
    with pytest.raises(ConfigError, match="baseline = 'mla': was not trained"):
        summary(rows, "mla")


@pytest.mark.parametrize("change, message", [
    (dict(variants=("gqa", "mal")), "variant = 'mal': is not registered. Fix: use mla"),
    (dict(variants=("gqa", "gqa")), "must be some, each once"),
    (dict(tasks=("mqr",)), "task = 'mqr': is not known. Fix: use mqar"),
    (dict(rates=()), "rates = (): must be some"),
    (dict(seeds=0), "seeds = 0: must be at least 1"),
    (dict(dim=15), "dim = 15: must be a multiple of heads = 2. Fix: use 14"),
    (dict(match="flops"), "match = 'flops': is not known"),
])
def test_wrong_grids(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(SMALL, **change)


def test_command(capsys, tmp_path):
    """Trained for real, a few steps; the second call finds everything there."""
    command = (
        "compare --variants gqa,cca --task induction --seeds 2 --rates 1e-3 --steps 20 --dim 16 "
        f"--layers 1 --out {tmp_path / 'c'}"
    ).split()
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "parameters matched by the width of the MLP; a convolution over 3 tokens" in first
    assert first.count("| induction |") == 2
    table = (tmp_path / "c" / "table.md").read_text()
    assert cli.main(command) == 0
    assert "2 cells are there, 0 are left" in capsys.readouterr().out
    assert (tmp_path / "c" / "table.md").read_text() == table
    assert cli.main([*command, "--seeds", "3"]) == 2
    assert "holds another grid (seeds differ)" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    ("--variants gqa --rates 1e-3,x", "--rates 1e-3,x: are no numbers"),
    ("--variants gqa --steps 7", "steps = 7: must be a multiple of points = 20"),
    ("--variants gqq", "variant = 'gqq': is not registered"),
])
def test_wrong_flags(flags, message, capsys, tmp_path):
    assert cli.main(["compare", *flags.split(), "--out", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "c").exists()
