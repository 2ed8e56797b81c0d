"""The real TPU compiler takes the training step on a mesh, with the fused kernel inside.

It also shows in which dtype sums over devices are really taken: compilers move casts.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

ABSENT = importlib.util.find_spec("libtpu") is None
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(ABSENT, reason='no libtpu here: pip install -e ".[aot]"'),
]


@pytest.mark.parametrize("name", ["gqa", "mqa", "mla", "cca"])
def test_sharded_step_compiles(root, name):
    run = subprocess.run(
        [sys.executable, "-m", "tests.tpu.train_step", "v5e:2x2", "fsdp=2,tensor=2", name],
        cwd=root, capture_output=True, text=True, timeout=500, check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["attention"] == ["splash"]
    assert found["kernels"] >= 3, "forward, dq and dk/dv"
    assert len(found["sums"]["f32"]) >= 10
    # The rows of a cut embedding table: every device but one adds zero, which is exact in bf16.
    assert all("gather" in name for name in found["sums"].get("bf16", [])), found["sums"]["bf16"]
