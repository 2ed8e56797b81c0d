"""The real compiler of the H200, without one: Mosaic GPU kernels become sm_90a code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from attnlab import cli
from attnlab.analysis import aot
from attnlab.analysis.targets import find
from attnlab.core.errors import ConfigError

try:
    aot.require(find("h200"))
    ABSENT = ""
except ConfigError as error:
    ABSENT = str(error)
pytestmark = [pytest.mark.aot, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]


def test_registers_spills_shared_memory(root, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compile_h200", str(tmp_path)], cwd=root,
        env=os.environ | aot.environment(find("h200"), tmp_path), capture_output=True, text=True,
        timeout=300, check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (kernel,) = json.loads(run.stdout.splitlines()[-1])
    assert kernel["name"].startswith("product") and kernel["wgmma"] == 4
    assert 64 <= kernel["registers"] <= 255 and kernel["spill_bytes"] == 0
    assert kernel["shared_bytes"] == (64 * 64 + 2 * 64 * 128) * 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_scanned_stack_lists_tiles_once(remat, root):
    """The compiler would leave the lists of the backward pass in its loop over the layers."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.planned_step", remat], cwd=root,
        env=os.environ | aot.environment(find("h200")), capture_output=True, text=True,
        timeout=300, check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["loops"] == 2, "forward and backward"
    assert found["inside"] == 0 and found["outside"] > 10, found


def test_table(capsys):
    code = cli.main("bench attention --target h200 --impl xla --shape gpt2-small-1k".split())
    out = capsys.readouterr().out
    assert code == 0 and "h200 (NVIDIA H200)  gpt2-small-1k  forward" in out
    assert "no predicted time: no Mosaic GPU kernel in it" in out
