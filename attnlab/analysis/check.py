"""``attnlab check``: versions, devices, the kernel of each variant, and a self-test of 20 seconds.

Ends with "all good" and 0, or with one thing to do and 1.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

Say = Callable[[str], None]

# The lower bounds of pyproject.toml (a test compares them); jaxlib moves with jax.
MINIMUM = {
    "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8",
    "orbax-checkpoint": "0.11.36", "grain": "0.2.18", "numpy": "2.0",
}
EXTRAS = {
    "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "tpu": ("libtpu",),
    "triton": ("jax-triton", "triton"),
    "kernels": ("tokamax",),
    "hf": ("safetensors", "tokenizers"),
    "tb": ("tensorboardX",),
    "wandb": ("wandb",),
    "gcs": ("gcsfs",),
}
EITHER = {"gpu"}  # one of the packages is enough
SECONDS = 20.0
REPORT = "please report it with this output"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong and the one thing to do about it."""

    what: str
    fix: str


def main(say: Say = print, debug: bool = False) -> int:
    """Run every check; the exit code. ``debug`` lets the errors of the checks through."""
    _compile_quickly()
    left: list[str] = []
    for part in (
        _versions, _devices, lambda s: _kernels(s, debug), lambda s: _self_test(s, debug, left)
    ):
        problem = part(say)
        if problem is not None:
            say("")
            say(f"problem: {problem.what}")
            say(f"fix: {problem.fix}")
            return 1
    say("")
    say(f"all good, but {len(left)} tests were not run (slow machine)" if left else "all good")
    return 0


def _compile_quickly() -> None:
    """On the CPU half of the time would be LLVM's optimiser; the tests look at numbers only.

    Works before jax has started; flags that are set already are left alone.
    """
    if nvidia_gpu() is None and "jax" not in sys.modules:
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


# Versions.


def installed(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release part of a version: digits up to the first part that is none."""
    parts = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in parts[0].split(".")) if parts else ()


def too_old(version: str, minimum: str) -> bool:
    """Whether ``version`` is below ``minimum``; missing parts count as 0."""
    a, b = _numbers(version), _numbers(minimum)
    width = max(len(a), len(b))
    return a + (0,) * (width - len(a)) < b + (0,) * (width - len(b))


def _versions(say: Say) -> Problem | None:
    import attnlab

    say(f"attnlab  {attnlab.__version__}, Python {platform.python_version()} on {sys.platform}")
    found = {name: installed(name) for name in MINIMUM}
    say("versions " + ", ".join(f"{n} {v or 'absent'}" for n, v in found.items()))
    say("extras   " + ", ".join(f"{n}: {extra_state(n)}" for n in EXTRAS))
    for name, minimum in MINIMUM.items():
        version = found[name]
        if version is None or too_old(version, minimum):
            what = f"{name} {version or 'is absent'}, attnlab needs {minimum} or newer"
            return Problem(what, f'pip install -U "{name}>={minimum}"')
    if _numbers(found["jaxlib"] or "")[:2] != _numbers(found["jax"] or "")[:2]:
        what = f"jax {found['jax']} with jaxlib {found['jaxlib']}"
        return Problem(what, "pip install -U jax jaxlib")
    return None


def extra_state(name: str) -> str:
    """``"yes"``, ``"no"``, or what of the extra is absent."""
    missing = [package for package in EXTRAS[name] if installed(package) is None]
    if not missing or (name in EITHER and len(missing) < len(EXTRAS[name])):
        return "yes"
    return "no" if len(missing) == len(EXTRAS[name]) else f"without {', '.join(missing)}"


# Devices.


def _devices(say: Say) -> Problem | None:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a plugin raises is the finding
        what = f"jax cannot start its devices ({_first_line(error)})"
        wanted = os.environ.get("JAX_PLATFORMS")
        if wanted:
            return Problem(what, f"unset JAX_PLATFORMS (it is {wanted!r}) or install that platform")
        return Problem(what, 'pip install -U "attnlab[gpu]" (or attnlab[tpu]), matching the driver')
    kinds = sorted({d.device_kind for d in devices})
    say(f"devices  {len(devices)} x {', '.join(kinds)} ({jax.default_backend()})")
    return _unused_hardware(jax.default_backend(), say)


def _unused_hardware(backend: str, say: Say) -> Problem | None:
    """An accelerator that is there while jax runs on the CPU."""
    if backend != "cpu":
        return None
    wanted = os.environ.get("JAX_PLATFORMS", "")
    gpu, tpu = nvidia_gpu(), any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    if wanted.startswith("cpu") and (gpu or tpu):
        say(f"note     JAX_PLATFORMS = {wanted!r} leaves {gpu or 'the TPU'} unused")
    elif gpu:
        what = f"nvidia-smi shows {gpu}, but this jax runs on the CPU only"
        return Problem(what, 'pip install -U "attnlab[gpu]"')
    elif tpu:
        what = "a TPU is attached, but this jax runs on the CPU only"
        return Problem(what, 'pip install -U "attnlab[tpu]"')
    return None


def nvidia_gpu() -> str | None:
    """The first GPU that nvidia-smi lists."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        run = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"GPU \d+: ([^(\n]+)", run.stdout)
    return found[1].strip() if found and run.returncode == 0 else None


# Kernels.


def _kernels(say: Say, debug: bool) -> Problem | None:
    from attnlab.analysis.explain import explain
    from attnlab.analysis.listing import sized
    from attnlab.core.registry import VARIANTS
    from attnlab.core.types import Precision

    bf16 = Precision.named("bfloat16")
    for name in VARIANTS:
        try:
            rows = explain([(name, sized(name, precision=bf16))])
        except Exception as error:
            if debug:
                raise
            return _broken(f"choosing the kernels of {name}", error)
        used = ", ".join(f"{r.mode} {r.op}/{r.chosen}" for r in rows)
        say(f"kernels  {name}: {used} (bf16, 4096 tokens)")
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _broken(what: str, error: BaseException) -> Problem:
    return Problem(f"{what} failed: {_first_line(error)}", f"{REPORT} (`attnlab check --debug`)")


# Self-test. Imports stay inside: this file must be importable where jax is not.


def _self_test(say: Say, debug: bool, left: list[str]) -> Problem | None:
    start = time.monotonic()
    for name, test in _tests():
        began = time.monotonic()
        if began - start > SECONDS:
            say(f"test     {name}: not run, the {SECONDS:.0f} seconds are over")
            left.append(name)
            continue
        try:
            test()
        except Exception as error:
            say(f"test     {name}: FAILED")
            if debug:
                raise
            return _broken(f"the self-test of {name}", error)
        say(f"test     {name}: ok ({time.monotonic() - began:.1f} s)")
    return None


def _tests() -> Iterator[tuple[str, Callable[[], None]]]:
    from attnlab.core.registry import VARIANTS

    yield "attention against the reference", test_attention
    yield "two training steps", test_training
    for name in VARIANTS:
        what = f"{name}, decode = train, packed = separate, gradients"
        yield what, functools.partial(test_variant, name)


def test_attention() -> None:
    """Every implementation that serves a small call here agrees with the fp32 reference."""
    import jax
    import jax.numpy as jnp

    from attnlab.core.dispatch import Device
    from attnlab.core.errors import ImplementationError
    from attnlab.ops.attention import OP, attention
    from attnlab.testing.budget import close

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, 128, heads, 64), jnp.bfloat16)
        for key, heads in zip(keys, (4, 2, 2), strict=True)
    )
    wide = (a.astype(jnp.float32) for a in (q, k, v))
    with jax.default_matmul_precision("highest"):
        oracle = jax.jit(lambda *a: attention(*a, impl="reference"))(*wide)
    for name in OP.order.get(Device.default().platform, OP.order["cpu"]):
        try:
            out = jax.jit(lambda *a, impl=name: attention(*a, impl=impl))(q, k, v)
        except ImplementationError:
            continue  # refuses this call or this machine; `attnlab explain` says why
        close(out, oracle, dtype="bfloat16", name=f"attention, impl={name}")


def test_training() -> None:
    """Two steps over all devices leave a finite, lower loss."""
    import jax
    import numpy as np

    from attnlab.analysis.listing import Shape, sized
    from attnlab.models.decoder import DecoderConfig
    from attnlab.parallel.mesh import make_mesh
    from attnlab.parallel.rules import RULES
    from attnlab.train.optimizer import OptimizerConfig
    from attnlab.train.state import Trainer

    layer = sized("gqa", Shape(dim=32, num_heads=4, num_kv_heads=2, head_dim=8))
    model = DecoderConfig(vocab_size=64, period=(layer,), repeats=1, mlp_dim=64)
    optimizer = OptimizerConfig(lr=1e-2, warmup=0, schedule="constant")
    trainer = Trainer(model, optimizer, 2, make_mesh(None), RULES, layout="full")
    B, T = len(jax.devices()), 16
    row = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch = {
        "tokens": row, "targets": row + 1, "positions": row, "segments": np.ones_like(row),
        "loss_mask": np.ones((B, T), np.float32),
    }
    batch = {k: jax.device_put(v, trainer.batch_sharding) for k, v in batch.items()}
    state, losses = trainer.init(0), []
    for _ in range(2):
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[1] < losses[0], f"losses {losses}"


def test_variant(name: str) -> None:
    """Packed training rows equal prefill and decode of separate documents; gradients are alive."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from attnlab.analysis.listing import Shape, sized
    from attnlab.core import versions
    from attnlab.core.types import Seq
    from attnlab.testing.budget import close

    T, shape = 6, Shape(dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
    config = sized(name, shape)
    row = jnp.arange(T, dtype=jnp.int32)[None]
    segments = jnp.repeat(jnp.array([[1, 2]], jnp.int32), T, axis=1)
    packed, separate = Seq(jnp.tile(row, (1, 2)), segments, "packed"), jnp.tile(row, (2, 1))

    @jax.jit
    def passes(x):
        layer = config.build(nnx.Rngs(0))
        graph, params = versions.split_module(layer)
        y, back = jax.vjp(lambda p: versions.merge_module(graph, p)(x, packed).y, params)
        grads = back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
        x = x.reshape(2, T, -1)
        if not config.decode:
            return y, grads, layer(x, Seq.full(2, T)).y
        cache = layer.init_cache(2, T)
        first = layer.prefill(x[:, : T - 1], Seq(separate[:, : T - 1]), cache)
        last = layer.decode(x[:, T - 1 :], Seq(separate[:, T - 1 :]), first.cache)
        return y, grads, jnp.concatenate([first.y, last.y], axis=1)

    x = jax.random.normal(jax.random.key(1), (1, 2 * T, config.dim))
    with jax.default_matmul_precision("highest"):
        y, grads, rows = jax.device_get(passes(x))
    close(y.reshape(rows.shape), rows, name=f"{name}: packed documents, and each of them decoded,")
    sizes = [float(abs(g).max()) for g in jax.tree.leaves(grads)]
    assert all(0 < size < float("inf") for size in sizes), f"{name}: gradient sizes {sizes}"
