"""A fresh process imports all of attnlab without any extra, and quickly."""

from __future__ import annotations

import os
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXTRAS = (
    "tokamax", "jax_triton", "triton", "tokenizers", "safetensors", "wandb", "tensorboardX",
    "torch", "gcsfs", "transformers", "trackio",
)
# fsspec too, but etils (under orbax and grain) tries it by itself and goes on without it.
BLOCKED = (*EXTRAS, "fsspec")
# Sources that triton compiles; what launches them imports them then.
KERNELS = tuple(
    f"attnlab.ops.attention.triton_{name}" for name in ("tiles", "forward", "backward")
)

IMPORT_ALL = f"""
import importlib, pathlib, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # any import of it raises ImportError
import attnlab
for path in sorted(pathlib.Path(attnlab.__file__).parent.rglob("*.py")):
    parts = path.relative_to({str(ROOT)!r}).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    if name in {KERNELS!r}:
        try:
            importlib.import_module(name)
        except ImportError as error:
            assert error.name == "triton", error
        else:
            raise AssertionError(name + " imports without triton: take it off the list")
    elif parts[-1] != "__main__":
        importlib.import_module(name)
for name in attnlab.__all__:
    getattr(attnlab, name)
assert set(attnlab.__all__) <= set(dir(attnlab))
try:
    attnlab.no_such_name
except AttributeError:
    pass
else:
    raise AssertionError("attnlab.no_such_name exists")
"""

IMPORT_PUBLIC = f"""
import sys
import attnlab
for name in attnlab.__all__:
    getattr(attnlab, name)
loaded = [name for name in {EXTRAS!r} if name in sys.modules]
assert not loaded, f"importing attnlab loads {{loaded}}"
"""

TIMED = """
import time
import jax, jax.numpy, flax.nnx
start = time.process_time()
{}
print(time.process_time() - start)
"""


def python(code: str) -> str:
    """The output of a fresh interpreter that runs ``code``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_everything_imports_without_extras():
    python(IMPORT_ALL)


def test_public_names_load_no_extra():
    python(IMPORT_PUBLIC)


@pytest.mark.parametrize("code", ["import attnlab", "import attnlab.layers.gqa"])
def test_import_is_quick(code: str):
    """Under a second of processor time beyond jax and flax (a busy machine stretches the clock)."""
    times = [float(python(TIMED.format(code))) for _ in range(3)]
    assert statistics.median(times) < 1.0, times
