"""The laboratory on the real TPU compiler: reports are read, schedules are as golden rows say."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

from attnlab import cli
from attnlab.analysis import aot, golden
from attnlab.analysis.targets import find

ABSENT = importlib.util.find_spec("libtpu") is None
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(ABSENT, reason='no libtpu here: pip install -e ".[aot]"'),
]
FILE = pathlib.Path(__file__).parent / "golden.json"
GOLDEN = golden.load(FILE)
ROWS = [row for row in GOLDEN["rows"] if row["target"] in golden.CHECKED]


def test_table(capsys, tmp_path):
    out = tmp_path / "rows.json"
    command = "bench attention --target v5e --shape gpt2-small-1k --impl splash,xla --out"
    code = cli.main([*command.split(), str(out), "--blocks", "block_q=256,block_kv=512", "used"])
    text = capsys.readouterr().out
    assert code == 0 and "predicted (static model), nothing measured" in text
    assert "xla: no prediction: no Pallas kernel in it" in text
    found = json.loads(out.read_text())
    rows = {(row["implementation"], row["forced"]): row for row in found}
    used, forced = rows["splash", False], rows["splash", True]
    assert used["blocks"]["block_q"] >= 512 and forced["blocks"]["block_q"] == 256
    assert used["basis"] == "predicted (static model), nothing measured"
    (kernel,) = used["kernels"]
    tiles = [1024 // used["blocks"][name] for name in ("block_q", "block_kv")]
    assert kernel["steps"] == 16 * 12 * tiles[0] * tiles[1] and kernel["role"] == "forward"
    assert 0.3 < kernel["mxu"] < 0.9 and 0.3 < used["kernel_ms"] < 3
    assert 0 < used["peak_share"] < 1 and used["vmem_bytes"] > 2**20
    assert forced["kernels"][0]["full"] < kernel["full"]


def test_errors_of_the_compiler_are_rows():
    cell = golden.cells([find("v5e")])[0]
    huge = {"block_q": 4096, "block_kv": 4096, "block_kv_compute": 4096}
    wrong = {"block_x": 1}
    results = list(aot.run([cell | {"blocks": blocks} for blocks in (huge, wrong)]))
    assert "out of on-chip memory: Scoped allocation with size" in results[0]["error"]
    assert "splash has no such block" in results[1]["error"]


def test_a_compiler_that_dies_or_hangs(monkeypatch):
    cells = golden.cells([find("v5e")])[:2]
    (slow,) = aot.run(cells[:1], limit_s=0.05)
    assert "took more than" in slow["error"]
    usual = aot.environment
    monkeypatch.setattr(
        aot, "environment", lambda *a: usual(*a) | {"LIBTPU_INIT_ARGS": "--no_such_flag=1"}
    )
    results = list(aot.run(cells))
    assert len(results) == 2
    assert all("the compiler died" in result["error"] for result in results), results


@pytest.mark.skipif(
    aot.version("libtpu") != GOLDEN["compiler"]["libtpu"],
    reason=f"golden rows were made with libtpu {GOLDEN['compiler']['libtpu']}, "
    f"here is {aot.version('libtpu')}: schedules differ between versions",
)
def test_schedules_are_not_slower():
    said = []
    for row, result in zip(ROWS, aot.run([golden.cell_of(row) for row in ROWS])):
        name = f"{row['target']} {row['implementation']} {row['direction']}"
        said += [f"{name}: {text}" for text in golden.complaints(row, result)]
    assert len(ROWS) >= 4 and not said, "\n".join(said)
