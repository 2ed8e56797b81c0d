"""``attnlab bench attention`` without a GPU: cases, references, clocks, processes."""

from __future__ import annotations

import dataclasses
import types

import bench_engines  # noqa: F401 - the child processes import it by name
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab.analysis import (
    bench_cases,
    bench_jax,
    bench_oracle,
    bench_worker,
)
from attnlab.analysis import bench_timing as timing
from attnlab.analysis.bench_cases import BOTH, FORWARD, Case, Decode
from attnlab.core.errors import ImplementationError

CASES = [c for c in bench_cases.CASES if isinstance(c, Case)]


def toy(case: Case, S: int = 256) -> Case:
    return dataclasses.replace(case, S=S, N=4, K=2 if case.name == "gqa-128" else 4 // (
        4 if case.K == 1 else 1), H=case.H // 8, V=case.V // 8)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_op_agrees_with_the_reference(case, tmp_path):
    """Case by case, gradients included: the op's own dense form against the harness's."""
    case, engine, path = toy(case), bench_jax.Engine(), str(tmp_path / "exact.npz")
    engine.reference(case, path)
    way = case.directions[-1]
    row = engine.prepare(case, "reference", way, path)
    assert row.get("reason") is None, row
    row |= engine.time("reference", way)
    names = {"o", "o_row"} | ({"dq", "dk", "dv"} if way == BOTH else set())
    assert set(row["errors"]) == names | ({"dtable"} if case.mod == "t5" else set())
    assert row["repeatable"] and row["device_ms"] is None and 0 < row["wall_ms"]
    assert row["method"] == "no kernel times on cpu"


@pytest.mark.parametrize("case", [c for c in CASES if c.mod or c.sight != "causal"],
                         ids=lambda c: c.name)
def test_a_forgotten_modification_is_not_timed(case, tmp_path):
    case, engine, path = toy(case), bench_jax.Engine(), str(tmp_path / "exact.npz")
    engine.reference(case, path)
    plain = dataclasses.replace(case, mod=None, sight="causal")
    for way in case.directions:
        row = engine.prepare(plain, "reference", way, path)
        assert row["reason"].startswith("disagrees") and not engine.ready, row


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pairs_are_those_that_the_reference_sees(case):
    case = toy(case)
    data = bench_cases.arrays(case)
    extras = {n: jnp.asarray(x) for n, x in data.items() if n == "segments"}
    if case.sight == "blocks":
        extras["blocks"] = jnp.asarray(bench_oracle._dense_blocks(case, data["lists"]))
    t = jnp.arange(case.S)
    seen = np.asarray(bench_oracle._seen(case, t[:, None], t[None], extras))
    heads = seen.shape[0] if seen.ndim == 3 else 1
    assert seen.sum() / heads == bench_cases.pairs(case, data)
    assert seen.any(-1).all()


def test_flops_and_the_share_of_the_blocks():
    case = Case("x", N=2, K=1, H=3, V=5)
    assert case.flops(FORWARD, 7) == 2 * 2 * 7 * (3 + 5)
    assert case.flops(BOTH, 7) == 2 * 2 * 7 * (3 + 5 + 9 + 10)
    blocks = next(c for c in CASES if c.sight == "blocks")
    lists = bench_cases._lists(blocks, np.random.default_rng(0))
    rows = blocks.S // blocks.block
    share = (lists >= 0).sum() / blocks.N / (rows * (rows + 1) / 2)
    assert 0.099 < share < 0.105 and len({row.tobytes() for row in lists[0]}) == blocks.N
    assert bench_cases.bucket_of(np.array([-3, 0, 15, 16, 18, 19, 127, 128, 9999])).tolist() == [
        0, 0, 15, 16, 16, 17, 31, 31, 31]
    step = Decode()
    assert step.bytes(FORWARD) == 2 * 64 * (32768 * 8 * 256 + 32 * 256)


def test_what_disagrees_is_not_timed():
    exact = {"o": np.ones((1, 8, 2, 4)), "dq": np.ones((1, 8, 2, 4))}
    assert bench_oracle.compare({"o": exact["o"] * 1.001}, exact)[1] is None
    one_row = exact["o"].copy()
    one_row[0, 3, 1] *= 1.06
    assert "o_row" in bench_oracle.compare({"o": one_row}, exact)[1]
    assert "dq nan" in bench_oracle.compare({"dq": exact["dq"] * np.nan}, exact)[1]
    assert "dq 3.0e-02 above 2e-02" in bench_oracle.compare({"dq": exact["dq"] * 1.03}, exact)[1]
    assert "shape" in bench_oracle.compare({"o": np.ones((1, 8, 2, 3))}, exact)[1]


def test_a_wrong_implementation_gets_a_reason_and_no_time(tmp_path, monkeypatch):
    case, engine, path = toy(CASES[0], 128), bench_jax.Engine(), str(tmp_path / "exact.npz")
    engine.reference(case, path)
    right = bench_jax.attention
    monkeypatch.setattr(bench_jax, "attention", lambda q, k, v, **kw: right(q, k, v * 1.1, **kw))
    row = engine.prepare(case, "reference", FORWARD, path)
    assert row["reason"].startswith("disagrees") and not engine.ready
    monkeypatch.setattr(bench_jax, "attention", lambda q, k, v, **kw: right(q, k, v / 0, **kw))
    assert engine.prepare(case, "reference", FORWARD, path)["reason"]


def test_decode_runs_over_pages_and_its_reference_is_dense():
    step = Decode(B=2, S=64, N=4, K=2, H=16, V=16, page=16)
    data = bench_jax.bench_decode.arrays(step)
    exact = bench_jax.bench_decode.reference(step, data)["o"]
    assert exact.shape == (2, 1, 4, 16)
    k = np.asarray(data["k"], np.float32)[np.asarray(data["pages"][1])].reshape(64, 2, 16)
    v = np.asarray(data["v"], np.float32)[np.asarray(data["pages"][1])].reshape(64, 2, 16)
    z = k[:, 1] @ np.asarray(data["q"], np.float32)[1, 0, 3] / 4
    p = np.exp(z - z.max())
    np.testing.assert_allclose(exact[1, 0, 3], p @ v[:, 1] / p.sum(), rtol=1e-4, atol=1e-5)
    function, args = bench_jax.bench_decode.call(step, "xla", data)
    np.testing.assert_allclose(np.asarray(function(*args)["o"], np.float32), exact, atol=2e-2)
    function, args = bench_jax.bench_decode.call(step, "gpu", data)
    with pytest.raises(ImplementationError, match="gpu: runs on Hopper GPUs, not on cpu"):
        function(*args)


# Clocks


def test_times_of_a_call(monkeypatch):
    """A call takes 2 ms on the device and 0.5 ms of the host, which the queue hides."""
    now = {"host": 0.0, "device": 0.0}

    def call():
        now["host"] += 0.5e-3
        now["device"] = max(now["device"], now["host"]) + 2e-3

    def wait(_):
        now["host"] = max(now["host"], now["device"])

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["host"])
    kernels = lambda count: ([[("a", 1.5), ("b", 0.2), ("a", 0.2)]] * count, "fake")  # noqa: E731
    times = timing.take(call, wait, kernels)
    assert times.wall_ms == pytest.approx(2.5) and times.queued_ms == pytest.approx(2.05)
    assert times.device_ms == pytest.approx(1.9) and times.method == "fake"
    assert times.kernels == pytest.approx({"a": 1.7, "b": 0.2}) and times.calls == 80


def test_traces_are_cut_into_calls():
    event = lambda cat, name, ts, dur: {"cat": cat, "name": name, "ts": ts, "dur": dur}  # noqa: E731
    trace = {"traceEvents": [
        event("kernel", "b", 30, 1000), event("cpu_op", "x", 1, 1),
        event("gpu_memset", "a", 2, 500),
        event("gpu_memset", "a", 20, 500), event("kernel", "b", 10, 3000), {"ph": "M"},
    ]}
    calls, method = timing.split(trace, 2)
    assert calls == [[("a", 0.5), ("b", 3.0)], [("a", 0.5), ("b", 1.0)]]
    assert method.startswith("torch.profiler") and timing.summed(calls)[0] == 2.5
    calls, method = timing.split(trace, 3)
    assert "mean of 3" in method and timing.summed(calls)[0] == pytest.approx(5 / 3)
    assert timing.split({}, 2) == ([], "torch.profiler saw no kernel")
    spot = lambda name, at, ns: types.SimpleNamespace(name=name, start_ns=at, duration_ns=ns)  # noqa: E731
    line = types.SimpleNamespace(name="Stream #1", events=[spot("k", 5, 2e6), spot("k", 1, 1e6)])
    host = types.SimpleNamespace(name="python", events=[spot("no", 0, 9e6)])
    plane = types.SimpleNamespace(name="/device:GPU:0", lines=[host, line])
    assert timing.events_of([plane], 2)[0] == [[("k", 1.0)], [("k", 2.0)]]


# Processes


def test_a_process_that_fails_dies_or_hangs_costs_one_answer(monkeypatch):
    monkeypatch.setitem(bench_worker.ENGINES, "jax", "bench_engines")
    worker = bench_worker.Worker("jax")
    try:
        assert worker.stamp()["stamp"]["device"] == "NVIDIA H200"
        assert worker.ask("measure", 60, how="answer") == {"answer": 1}
        assert worker.ask("measure", 60, how="refuse") == {
            "reason": "RuntimeError: refuse | second line"}
        first = worker.process.pid
        assert worker.ask("measure", 60, how="answer") and worker.process.pid == first
        fault = worker.ask("measure", 60, how="fault")
        assert fault["lost"] and worker.process is None
        assert worker.ask("measure", 60, how="answer") == {"answer": 1}
        assert "exit code 3" in worker.ask("measure", 60, how="die")["reason"]
        assert worker.ask("measure", 1, how="hang") == {
            "reason": "no answer in 1 s: stopped", "lost": True}
    finally:
        worker.stop()
    assert worker.process is None


def test_a_framework_that_is_absent_is_a_reason(monkeypatch):
    monkeypatch.setitem(bench_worker.ENGINES, "torch", "no_such_framework")
    worker = bench_worker.Worker("torch")
    assert worker.stamp()["reason"].startswith("ModuleNotFoundError: No module named")
    assert worker.process is None


def test_kernels_of_jax_by_cupti_or_else_by_a_trace(monkeypatch):
    import jax

    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")
    function, args = jax.jit(lambda x: x + 1), (jnp.ones(4),)
    assert timing.jax_kernels(function, args, 2) == ([], "no kernel times on cpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernels = [("k", 1.0), ("l", 2.0)]

    def measure(f, aggregate, iterations=1):
        if apart and iterations > 1:
            raise RuntimeError("Kernel names are not consistent across iterations")
        return lambda *args: (f(*args), [kernels] * iterations if iterations > 1 else kernels)

    monkeypatch.setattr(profiler, "measure", measure)
    for apart, count in ((False, 3), (False, 1), (True, 3)):
        calls, method = timing.jax_kernels(function, args, count)
        assert method == "CUPTI, kernels" and timing.summed(calls)[0] == 3.0
        assert len(calls) == (timing.LEAST if apart else count)
    monkeypatch.setattr(profiler, "measure", lambda *a, **k: lambda *args: (args, None))
    assert timing.jax_kernels(function, args, 1) == ([], "the CUPTI profiler saw no kernel")
    monkeypatch.delattr(profiler, "measure")
    calls, method = timing.jax_kernels(function, args, 2)
    assert not calls and method.startswith("jax.profiler saw no kernel (CUPTI profiler: ")
