"""A stack that plans its masks on 8 virtual devices: every device its own rows, same numbers."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import pytest

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_multi_thread_eigen=false"
)


@pytest.mark.devices8
@pytest.mark.timeout(900)
def test_planned_on_meshes():
    environment = os.environ | {
        "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1]),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "planned_stack.py")],
        capture_output=True, text=True, env=environment, timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.count("collectives") == 3
