"""Run a script on 8 virtual devices, in a process of its own."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_multi_thread_eigen=false"
)


def run(script: str, *args: str, timeout: float, flags: str = "", cached: bool = True) -> str:
    """What ``script`` of this folder prints; fails where it does.

    flags: more of XLA's. cached: compiled programs are kept; what is not compiled again is not
    dumped.
    """
    environment = os.environ | {
        "XLA_FLAGS": f"{FLAGS} {flags}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parents[1]),
    }
    if cached:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    done = subprocess.run(
        [sys.executable, str(HERE / script), *args],
        capture_output=True, text=True, env=environment, timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
