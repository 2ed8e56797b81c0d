"""The real TPU compiler takes the attention kernels, forward and backward, with all they serve."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

ABSENT = importlib.util.find_spec("libtpu") is None
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(ABSENT, reason='no libtpu here: pip install -e ".[aot]"'),
]


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_kernels_compile(root, topology):
    run = subprocess.run(
        [sys.executable, "-m", "tests.tpu.attention_cells", topology],
        cwd=root, capture_output=True, text=True, timeout=500, check=False,
    )
    done = dict(line.split("\t") for line in run.stdout.splitlines())
    assert run.returncode == 0, f"after {list(done)}: {run.stderr[-3000:]}"
    # Memory stays linear in S: no array of T x S floats (4 MiB a head at T = S = 1024).
    assert float(done["causal 128"]) < 4
