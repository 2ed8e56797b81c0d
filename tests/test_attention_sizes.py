"""The experiment that measures sizes of attention kernels: its candidates, its rows, its table."""

from __future__ import annotations

import importlib.util
import json

import pytest

from attnlab.analysis import bench_cases
from attnlab.analysis.bench_cases import BOTH, FORWARD
from attnlab.core.errors import ConfigError


@pytest.fixture
def script(root):
    spec = importlib.util.spec_from_file_location("sizes", root / "experiments/attention_sizes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fake:
    """A worker that compiles at once; sizes it does not like have a reason."""

    def __init__(self, kind):
        self.sizes = {}

    def stamp(self):
        return {"stamp": {"device": "NVIDIA H200", "versions": {"jax": "1"}}}

    def ask(self, method, seconds, **arguments):
        if method == "compile":
            self.sizes = arguments["sizes"]
            return {"compile_s": 1.0}
        if method == "check":
            return {"reason": "disagrees"} if self.sizes.get("stages") == 3 else {"pairs": 8.0}
        if method == "time":
            ms = 1.0 if self.sizes.get("block_k") == 64 else 2.0
            return {"device_ms": ms, "queued_ms": ms, "wall_ms": ms, "kernels": {}, "calls": 1}
        return {}

    def stop(self):
        pass


def options(script, tmp_path, *words):
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", ["sizes", "--out", str(tmp_path / "rows.json"), *words]):
        script.main()
    return json.loads((tmp_path / "rows.json").read_text())


def test_rows_and_table(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "Worker", Fake)
    words = "--case causal-128 --direction fwd --jobs 2 --try stages=2,block_k=64,persistent=1"
    rows = options(script, tmp_path, *words.split())
    assert rows[0]["sizes"] == {} and len(rows) > 4
    assert {"block_k": 64, "stages": 2, "persistent": 1} in [row["sizes"] for row in rows]
    assert {row["direction"] for row in rows} == {FORWARD}
    wrong = [row for row in rows if row.get("reason")]
    assert wrong and all(row["sizes"]["stages"] == 3 for row in wrong)
    assert all(len(row["rounds_ms"]) == 3 for row in rows if row not in wrong)
    capsys.readouterr()
    assert len(options(script, tmp_path, *words.split())) == len(rows), "measured again, replaced"
    options(script, tmp_path, "--table")
    lines = capsys.readouterr().out.splitlines()[-len(rows):]
    assert "1.000 ms  0.500" in lines[0] and "block_k=64" in lines[0]
    assert "disagrees" in lines[-1]


def test_candidates_are_of_the_case(script):
    cases = {case.name: case for case in bench_cases.CASES}
    found = script.jobs([cases["causal-128"], cases["documents"]], "gpu", (FORWARD, BOTH), [])
    assert [sizes for *_, sizes in found[:4]] == [{}] * 4, "the heuristics first"
    fused = {case.name for case, _, sizes in found if sizes.get("fused_dkv")}
    assert fused == {"causal-128"}, "it serves causal and full masks"
    given = script.jobs([cases["causal-64"]], "gpu", (FORWARD,), [{"stages": 9, "stages_dq": 2}])
    assert given[-1][2] == {"stages": 9}, "what the direction has no use for is left out"


def test_a_wrong_word(script, tmp_path):
    with pytest.raises(ConfigError, match="--try stages: is not name=number"):
        options(script, tmp_path, "--try", "stages")


def test_where_the_kernel_is_refused_there_is_a_reason(script, tmp_path):
    """With real processes."""
    words = "--case causal-64 --seq-len 128 --direction fwd --jobs 1"
    rows = options(script, tmp_path, *words.split())
    assert rows and all("runs on Hopper GPUs" in row["reason"] for row in rows)
