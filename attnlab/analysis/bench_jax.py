"""The jax side of ``attnlab bench attention``: the op by implementation, references, ceilings."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis import bench_cases as cases
from attnlab.analysis import bench_decode, bench_oracle, bench_timing
from attnlab.analysis.bench_cases import BOTH, OURS, Case, Decode
from attnlab.analysis.bench_worker import versions
from attnlab.core.mask import Blocks, Causal, Coords, Mask, SinkTokens, Window
from attnlab.ops.attention import attention, gpu, plan, tuning

PACKAGES = ("jax", "jaxlib", "tokamax", "jax-triton", "triton", "nvidia-cudnn-cu13", "numpy")


class Engine:
    """Measures calls of the op on the first device of jax; keeps the data of one case there, and
    the calls of it that are ready to be timed."""

    def __init__(self) -> None:
        self.case: Case | Decode | None = None
        self.compiled: dict[tuple[str, str], Any] = {}
        self.ready: dict[tuple[str, str], Any] = {}
        self.data: dict[str, jax.Array] = {}
        self.pairs = 0.0

    def stamp(self) -> dict[str, Any]:
        """The device and the versions that stand in every row of this engine."""
        device = jax.devices()[0]
        return {"device": device.device_kind, "platform": device.platform,
                "versions": versions(PACKAGES)}

    def healthy(self) -> bool:
        """Whether the device still computes; a CUDA fault is final for its process."""
        try:
            return float(jnp.ones(8).sum()) == 8.0
        except Exception:  # whatever it is, the process is of no more use
            return False

    def ceilings(self) -> dict[str, Any]:
        """Measured rates of the device: a large bf16 product and a large copy (read + written)."""
        small = jax.default_backend() == "cpu"
        side, numbers = (256, 2**16) if small else (8192, 2**30)
        a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (0, 1))
        product = _best(jax.jit(jnp.matmul), a, b)
        x = jax.random.bits(jax.random.key(2), (numbers // 2,), jnp.uint32).view(jnp.bfloat16)
        copy = _best(jax.jit(jnp.copy), x)
        return {"matmul_tflops": 2 * side**3 / product / 1e12,
                "copy_gb_s": 2 * x.nbytes / copy / 1e9}

    def reference(self, case: Case | Decode, path: str) -> dict[str, Any]:
        """Write the exact results of a case to ``path`` (npz)."""
        started = time.perf_counter()
        if isinstance(case, Decode):
            exact = bench_decode.reference(case, self._load(case))
        else:
            exact = bench_oracle.reference(case, cases.arrays(case))
        np.savez(path, **exact)
        return {"reference_s": time.perf_counter() - started}

    def prepare(
        self, case: Case | Decode, impl: str, direction: str, reference: str
    ) -> dict[str, Any]:
        """Compile one cell and compare it with the reference file: a part of its row. A cell that
        agrees can be timed as long as its case lasts."""
        compiled = self.compile(case, impl, direction)
        return compiled | self.check(impl, direction, reference)

    def compile(
        self, case: Case | Decode, impl: str, direction: str, sizes: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """The first half of ``prepare``; ``sizes`` to force, see ``ops.attention.tuning``."""
        data = self._load(case)
        started = time.perf_counter()
        with tuning.forcing(sizes) if sizes else contextlib.nullcontext():
            if isinstance(case, Decode):
                function, args = bench_decode.call(case, impl, data)
            else:
                function, args = call(case, impl, direction, data)
            compiled = function.lower(*args).compile()
        self.compiled[impl, direction] = compiled, args
        return {"compile_s": time.perf_counter() - started}

    def check(self, impl: str, direction: str, reference: str) -> dict[str, Any]:
        """The second half of ``prepare``: all that it does on the device."""
        function, args = self.compiled.pop((impl, direction))
        case, data = self.case, self.data
        first = jax.block_until_ready(function(*args))
        row: dict[str, Any] = {"pairs": self.pairs}
        finite = all(bool(jnp.isfinite(x).all()) for x in first.values())
        with np.load(reference) as exact:
            tokens = exact["tokens"]
            rows = len(exact["o"])
            found = {
                n: np.asarray(x if n == "dtable" else x[:rows, tokens]) for n, x in first.items()
            }
            row["errors"], wrong = bench_oracle.compare(found, exact)
        if wrong or not finite:
            return row | {"reason": wrong or "results are not finite"}
        again = function(*args)
        row["repeatable"] = all(bool((again[n] == x).all()) for n, x in first.items())
        del first, again, found
        if isinstance(case, Case) and case.sight == "blocks" and impl in OURS:
            row |= lists_times(case, data)
        if isinstance(case, Case) and planned(case, impl):
            build = jax.jit(functools.partial(_plan, case))
            row["lists_ms"] = _device_ms(build, (data["positions"], data["segments"]))
        self.ready[impl, direction] = function, args
        return row

    def time(self, impl: str, direction: str) -> dict[str, Any]:
        """A round of timing a cell that is ready; the rest of its row."""
        function, args = self.ready[impl, direction]
        return _times(function, args).row()

    def _load(self, case: Case | Decode) -> dict[str, jax.Array]:
        if self.case != case:
            self.case, self.data, self.compiled, self.ready = None, {}, {}, {}
            if isinstance(case, Decode):
                self.data, self.pairs = bench_decode.arrays(case), float(case.S)
            else:
                host = cases.arrays(case)
                self.pairs = cases.pairs(case, host)
                self.data = {name: jnp.asarray(x) for name, x in host.items()}
            self.case = case
        return self.data


def call(case: Case, impl: str, direction: str, data: dict[str, jax.Array]):
    """``(function, args)``: a jitted call of the op that returns its results by name.

    Everything dynamic (slopes, table, segments, block lists) is an argument, so that nothing is
    computed at compile time.
    """
    learned = ("table",) if case.mod == "t5" else ()
    fixed = {n: data[n] for n in ("slopes", "segments", "positions", "lists") if n in data}
    if planned(case, impl):
        fixed["plan"] = jax.jit(functools.partial(_plan, case))(data["positions"], data["segments"])

    def forward(q, k, v, learned, fixed):
        mod = _score_mod(case, fixed | learned)
        options: dict[str, Any] = {} if mod is None else {"score_mod": mod}
        if case.sight == "documents":
            rows = {name: fixed[name][None] for name in ("segments", "positions")}
            options |= rows | {"layout": "packed"}
        if case.mod == "cap":
            options["logit_cap"] = cases.CAP
        mask = fixed["plan"] if "plan" in fixed else _mask(case, fixed)
        return attention(q, k, v, mask=mask, impl=impl, **options)

    args = [data["q"], data["k"], data["v"], {name: data[name] for name in learned}]
    if direction != BOTH:
        return jax.jit(lambda *args: {"o": forward(*args)}), [*args, fixed]

    def both(q, k, v, learned, fixed, do):
        o, pull = jax.vjp(lambda *args: forward(*args, fixed), q, k, v, learned)
        dq, dk, dv, dlearned = pull(do)
        return {"o": o, "dq": dq, "dk": dk, "dv": dv} | {f"d{n}": x for n, x in dlearned.items()}

    return jax.jit(both), [*args, fixed, data["do"]]


def lists_times(case: Case, data: dict[str, jax.Array]) -> dict[str, float | None]:
    """Milliseconds to build the block lists of a block-sparse case, and the transposed ones."""
    from attnlab.ops.attention.blocks import block_lists

    place = jnp.arange(case.S, dtype=jnp.int32)
    coords = Coords(jnp.broadcast_to(place, (case.B, case.S)), None, place)
    found: dict[str, float | None] = {}
    for name, transposed in (("lists_ms", False), ("transposed_ms", True)):

        def build(lists, coords, transposed=transposed):
            mask = _mask(case, {"lists": lists}).bound(case.B, case.N)
            return block_lists(
                mask, coords, coords, block_q=case.block, block_k=case.block, layout="full",
                transposed=transposed,
            )

        found[name] = _device_ms(jax.jit(build), (data["lists"], coords))
    return found


def planned(case: Case, impl: str) -> bool:
    """Whether the block lists are built before the call, once a step, as by FlexAttention."""
    return case.sight == "documents" and impl.startswith("gpu")


def _plan(case: Case, positions, segments):
    mask: Any = Causal()
    heads = ((case.N, case.H), (case.K, case.H), (case.K, case.V))
    q, k, v = (jax.ShapeDtypeStruct((case.B, case.S, *x), jnp.bfloat16) for x in heads)
    for block_q, block_k in gpu.tiles(q, k, v, layout="packed"):
        mask = plan(
            mask, positions=positions[None], segments=segments[None], layout="packed",
            batch=case.B, heads=case.N, block_q=block_q, block_k=block_k,
        )
    return mask


def _times(function, args) -> bench_timing.Times:
    return bench_timing.take(
        lambda: function(*args), jax.block_until_ready,
        functools.partial(bench_timing.jax_kernels, function, args),
    )


def _device_ms(function, args) -> float | None:
    times = _times(function, args)
    return times.queued_ms if times.device_ms is None else times.device_ms


def _mask(case: Case, fixed) -> Mask:
    if case.sight == "window":
        return Causal() & Window(case.window) | SinkTokens(cases.SINKS)
    if case.sight == "blocks":
        return Causal() & Blocks(fixed["lists"], case.block, case.block)
    return Causal()


def _score_mod(case: Case, values):
    """``f(score, head, q_pos, k_pos)`` on scalars, or None."""
    if case.mod == "alibi":
        return lambda z, head, t, s: z + values["slopes"][head] * (s - t)
    if case.mod == "t5":
        return lambda z, head, t, s: z + values["table"][head, _bucket(t - s)]
    return None


def _bucket(distance):
    """T5's causal bucket; see ``bench_cases.bucket_of``."""
    n = jnp.maximum(distance, 0)
    octaves = jnp.log2(jnp.maximum(n, 1).astype(jnp.float32) / cases.EXACT)
    far = cases.EXACT + (octaves * cases.STEPS).astype(jnp.int32)
    return jnp.where(n < cases.EXACT, n, jnp.minimum(far, cases.BUCKETS - 1))


def _best(function, *args) -> float:
    """Seconds of one warm call where ten wait in the queue, the best of three."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(10):
            result = function(*args)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - started) / 10)
    return min(times)
