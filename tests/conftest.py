"""Settings of every test process; they must stand before jax starts."""

from __future__ import annotations

import gc
import itertools
import os
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = [*pathlib.Path("/dev").glob("nvidia[0-9]*"), *pathlib.Path("/dev").glob("accel*")]
CPU = os.environ.get("JAX_PLATFORMS", "" if DEVICES else "cpu") == "cpu"

if CPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA's threads: the GPU interpreter blocks one for each warpgroup that waits on a barrier.
    os.environ.setdefault("NPROC", "8")
    # Tiny programs: compile time is what counts, and xdist already uses the cores.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
    )

import jax  # noqa: E402
import pytest  # noqa: E402

if CPU:
    # A folder a worker: jax writes its entries in place, so one must not read while another writes.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = ROOT / ".pytest_cache" / f"jax-{jax.__version__}" / worker
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_debug_nans", False)  # an empty attention row makes -inf on purpose


# Linux gives a process 65530 memory maps, a compiled program takes several, and the one that finds
# no room crashes the process.
MAPS, MOST_MAPS, LOOK_EVERY = pathlib.Path("/proc/self/maps"), 30_000, 10
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Let go of compiled programs before their memory maps run out."""
    yield
    if next(_tests) % LOOK_EVERY == 0 and MAPS.exists():
        if len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
            jax.clear_caches()
            gc.collect()


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository."""
    return ROOT
