"""Every variant under dp, fsdp, tp and their product on 8 virtual devices = on one device."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import pytest

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


@pytest.mark.devices8
@pytest.mark.timeout(1500)  # 90 s of processor time; eight virtual devices crawl on a busy machine
def test_sharded_is_unsharded():
    environment = os.environ | {
        "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1]),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded_layers.py")],
        capture_output=True, text=True, env=environment, timeout=1400,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
