"""``attnlab bench attention``: the loop over cells, stored rows, limits, the table, the command."""

from __future__ import annotations

import importlib.util
import json

import pytest

from attnlab import cli
from attnlab.analysis import bench_attention, bench_report
from attnlab.analysis.bench_cases import BOTH, FORWARD, Decode
from attnlab.core.errors import ConfigError, DataError


class Fake:
    """A worker that answers at once; ``ms[impl]`` is the device time, or the reason for none."""

    def __init__(self, ms, versions=None, platform="gpu", clock=None, dies_at=None,
                 slow_reference=False):
        self.dies_at, self.slow_reference = dies_at, slow_reference
        self.ms, self.asked, self.timed, self.clock = ms, [], [], clock
        self.versions, self.platform = versions or {"jax": "1"}, platform

    def stamp(self):
        return {"stamp": {"device": "NVIDIA H200", "platform": self.platform,
                          "versions": self.versions}}

    def ask(self, method, seconds, **arguments):
        if method == "ceilings":
            return {"matmul_tflops": 790.0, "copy_gb_s": 4300.0}
        if method == "reference":
            if self.slow_reference:
                self.clock[0] += seconds
                return {"reason": f"no answer in {seconds:.0f} s: stopped", "lost": True}
            return {"reference_s": 1.0}
        ms = self.ms[arguments["impl"]]
        if method == "time":
            self.timed.append((arguments["impl"], arguments["direction"]))
            if self.dies_at == len(self.timed):
                self.asked.append("lost")
                return {"reason": "it died", "lost": True}
            ms *= 1.5 if self.timed.count(self.timed[-1]) == 2 else 1  # the card was warm
            return {"device_ms": ms, "queued_ms": ms * 1.05, "wall_ms": ms * 1.2,
                    "kernels": {"k": ms}, "method": "fake", "calls": 5}
        assert method == "prepare"
        self.asked.append((arguments["case"].name, arguments["impl"], arguments["direction"]))
        if self.clock:
            self.clock[0] += 30
        if isinstance(ms, str):
            return {"reason": ms}
        return {"pairs": 1e8, "compile_s": 1.0, "errors": {"o": 1e-3}, "repeatable": True}

    def stop(self):
        pass


def measured(tmp_path, jax_ms, torch_ms, words="causal-128", **options):
    workers = {"jax": Fake(jax_ms, **options.pop("jax", {})), "torch": Fake(torch_ms)}
    cells = bench_attention.chosen(words, options.pop("impl", "gpu,flex,cudnn"))
    rows, done, left = bench_attention.run(
        cells, workers, tmp_path / "rows.json", command="attnlab bench attention",
        say=lambda line: None, **options,
    )
    asked = {cell for worker in workers.values() for cell in worker.asked if cell != "lost"}
    not_asked = {
        (r["case"], r["impl"], r["direction"]) for r in rows
        if str(r["reason"]).startswith("no reference")
    }
    assert {(case.name, impl, way) for case, impl, way in done} == asked | not_asked
    return rows, left, workers, cells


def test_rows_are_stored_skipped_and_measured_again(tmp_path):
    jax_ms, torch_ms = {"gpu": 2.0, "cudnn": "is not served"}, {"flex": 3.0}
    rows, left, workers, _ = measured(tmp_path, jax_ms, torch_ms)
    assert not left and len(rows) == 6 == len(json.loads((tmp_path / "rows.json").read_text()))
    gpu = next(r for r in rows if r["impl"] == "gpu" and r["direction"] == BOTH)
    assert gpu["tflops"] == pytest.approx(2 * 16 * 1e8 * 128 * 7 / 2e-3 / 1e12)
    assert gpu["roofline_ms"] == pytest.approx(gpu["flops"] / 989e12 * 1e3)
    assert gpu["reason"] is None and gpu["matmul_tflops"] == 790 and len(gpu["revision"]) == 12
    refused = next(r for r in rows if r["impl"] == "cudnn")
    assert refused["reason"] == "is not served" and "tflops" not in refused
    _, _, workers, _ = measured(tmp_path, jax_ms, torch_ms)
    assert not workers["jax"].asked and not workers["torch"].asked
    _, _, workers, _ = measured(tmp_path, jax_ms, torch_ms, again=True)
    assert len(workers["jax"].asked) == 4 and len(workers["torch"].asked) == 2
    rows, _, workers, _ = measured(tmp_path, jax_ms, torch_ms, jax={"versions": {"jax": "2"}})
    assert len(workers["jax"].asked) == 4 and not workers["torch"].asked and len(rows) == 6


def test_the_limit_leaves_cells(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench_attention.time, "monotonic", lambda: clock[0])
    rows, left, _, cells = measured(
        tmp_path, {"gpu": 2.0, "cudnn": 2.0}, {"flex": 3.0}, seconds=100, jax={"clock": clock}
    )
    assert len(rows) + len(left) == len(cells) == 6 and left and clock[0] <= 100
    assert left == cells[len(rows):]
    rows, left, _, _ = measured(tmp_path, {"gpu": 2.0, "cudnn": 2.0}, {"flex": 3.0}, seconds=1e4)
    assert not left and len(rows) == 6


def test_what_the_limit_cuts_short_gets_no_row(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench_attention.time, "monotonic", lambda: clock[0])
    slow = {"clock": clock, "slow_reference": True}
    rows, left, _, cells = measured(tmp_path, {"gpu": 2.0, "cudnn": 2.0}, {"flex": 3.0},
                                    seconds=100, jax=slow)
    assert not rows and left == cells
    rows, left, *_ = measured(tmp_path, {"gpu": 2.0, "cudnn": 2.0}, {"flex": 3.0}, jax=slow)
    assert not left and {r["reason"] for r in rows} == {"no reference: no answer in 180 s: stopped"}


def test_the_table_holds_ratios_and_reasons(tmp_path):
    rows, _, _, cells = measured(tmp_path, {"gpu": 2.0, "cudnn": "cudnn: no"}, {"flex": 3.0},
                                 words="causal-128,blocks")
    text = bench_report.table(rows, [(c.name, i, w, c.S) for c, i, w in cells])
    line = next(l.split() for l in text.splitlines() if l.startswith("causal-128") and " gpu " in l)
    assert line[:4] == ["causal-128", "fwd", "gpu", "2.000"] and line[-2:] == ["1.50", "1.50"]
    assert "cudnn: no [causal-128, blocks]" in text
    assert "blocks fwd gpu: 1.00 x faster than dense causal" in text
    assert "790 TFLOP/s, copy 4300 GB/s" in text
    for row in rows:
        row["run"] = row["impl"]
    assert "1.50*" in bench_report.table(rows, [(c.name, i, w, c.S) for c, i, w in cells])
    slow = next(r for r in rows if r["impl"] == "flex") | {"device_ms": None}
    gpu = next(r for r in rows if r["impl"] == "gpu")
    assert bench_report.ratio(gpu, [slow])[0] == pytest.approx(1.5)  # both by the queue


def test_cells_of_a_call_are_timed_in_turn(tmp_path):
    rows, _, workers, _ = measured(tmp_path, {"gpu": 2.0, "cudnn": 4.0}, {"flex": 3.0})
    ways = [way for way in (FORWARD, BOTH) for _ in range(6)]
    assert workers["jax"].timed == [*zip(["gpu", "cudnn"] * 6, ways, strict=True)]
    assert all(r["rounds_ms"] == [r["device_ms"] * x for x in (1, 1.5, 1)] for r in rows)
    assert all(r["calls"] == 15 for r in rows)


def test_a_process_that_dies_costs_one_cell(tmp_path):
    """The others of its process are made ready again."""
    rows, left, workers, _ = measured(
        tmp_path, {"gpu": 2.0, "cudnn": 4.0}, {"flex": 3.0}, jax={"dies_at": 3}
    )
    reasons = {(r["impl"], r["direction"]): r["reason"] for r in rows}
    assert reasons.pop(("gpu", FORWARD)) == "it died" and set(reasons.values()) == {None}
    asked = workers["jax"].asked
    assert asked[asked.index("lost") + 1] == ("causal-128", "cudnn", FORWARD) and not left


def test_long_rows_need_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match=r"timed on a GPU.*--seq-len 2048"):
        measured(tmp_path, {"gpu": 1.0, "cudnn": 1.0}, {"flex": 1.0}, jax={"platform": "cpu"})


def test_decode_and_tuned_cells_are_chosen_where_they_belong():
    cells = bench_attention.chosen(None, None)
    assert {impl for case, impl, _ in cells if isinstance(case, Decode)} == {"gpu", "triton", "xla"}
    assert {case.name for case, impl, _ in cells if impl == "flex-exp"} == {"cap"}
    assert "flex-tuned" not in {impl for _, impl, _ in cells}
    assert bench_attention.chosen("t5", "flex-tuned", "bwd")[0][1:] == ("flex-tuned", BOTH)
    assert not [way for case, _, way in cells if case.name == "mla-576" and way == BOTH]
    assert bench_attention.revision("flex") != bench_attention.revision("gpu")


def test_the_command(tmp_path, capsys, monkeypatch):
    """Through the command line, with real processes: xla is timed, torch refuses here."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    out = tmp_path / "rows.json"
    words = "bench attention --case causal-64 --impl xla,flex --direction fwd --seq-len 128 --out"
    assert cli.main([*words.split(), str(out)]) == 0
    rows = {row["impl"]: row for row in json.loads(out.read_text())}
    assert rows["xla"]["reason"] is None and rows["xla"]["errors"]["o"] < 1e-2
    assert rows["flex"]["reason"] and str(tmp_path) not in json.dumps([*rows.values()])
    assert rows["xla"]["command"] == "attnlab bench attention --case causal-64 --impl xla,flex" \
        " --seq-len 128 --direction fwd"
    printed = capsys.readouterr().out
    assert "causal-64  fwd  xla" in printed and "flex: " in printed.splitlines()[-1]
    assert cli.main([*words.split(), str(out)]) == 0
    assert "0 cells, 2 stored already" in capsys.readouterr().out


def test_the_experiment_draws_from_stored_rows(tmp_path, root, monkeypatch):
    spec = importlib.util.spec_from_file_location("x", root / "experiments/bench_attention.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "ROWS", tmp_path / "rows.json")
    with pytest.raises(DataError, match="no timed row"):
        script.plot()
    measured(tmp_path, {"gpu": 2.0, "cudnn": "no"}, {"flex": 3.0}, words="causal-128,t5")
    script.plot()
    assert (tmp_path / "bench_attention.png").stat().st_size > 5000
    lines = script.table().splitlines()
    assert lines[0].startswith("| NVIDIA H200 |") and len(lines) == 6
    assert "gpu: 2.000, 410" in lines[2] and "| flex: 3.000 | 1.50 | 3.000 | 1.50 |" in lines[2]
