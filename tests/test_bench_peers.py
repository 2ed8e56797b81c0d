"""The torch side of the benchmark on CPU, where torch is installed; it is no dependency."""

from __future__ import annotations

import dataclasses

import pytest

from attnlab.analysis import bench_cases, bench_jax, peers
from attnlab.analysis.bench_cases import BOTH, FORWARD
from attnlab.core.errors import UnsupportedError

torch = pytest.importorskip("torch", reason="torch is not installed")


def case_of(name: str, S: int):
    case = next(c for c in bench_cases.CASES if c.name == name)
    return dataclasses.replace(case, S=S, N=4, K=2 if name == "gqa-128" else 4, H=32, V=32)


def measure(engine, case, impl: str, way: str, tmp_path):
    path = str(tmp_path / "exact.npz")
    bench_jax.Engine().reference(case, path)
    row = engine.prepare(case, impl, way, path)
    return row if row.get("reason") else row | engine.time(impl, way)


@pytest.mark.parametrize("name", ["causal-128", "gqa-128"])
def test_gradients_come_out_by_name(name, tmp_path, monkeypatch):
    """torch's plain attention in the place of cuDNN, which has no CPU form."""
    engine = peers.Engine("cpu")
    plain = torch.nn.functional.scaled_dot_product_attention

    def forward(case):
        return lambda q, k, v: plain(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(engine, "_cudnn", forward)
    row = measure(engine, case_of(name, 256), "torch-cudnn", BOTH, tmp_path)
    assert row.get("reason") is None, row
    assert set(row["errors"]) == {"o", "o_row", "dq", "dk", "dv"} and row["repeatable"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name", ["causal-128", "cap", "alibi", "t5", "documents", "window-sinks", "gqa-128", "blocks",
     "cap, flex-exp"],
)
def test_flex_attention_computes_the_case(name, tmp_path):
    """Forward; compiled for the CPU (2048 tokens: its blocks have 128, as on a GPU)."""
    name, _, form = name.partition(", ")
    row = measure(peers.Engine("cpu"), case_of(name, 2048), form or "flex", FORWARD, tmp_path)
    assert row.get("reason") is None, row
    assert row["lists_ms"] > 0 and row["method"] == "no kernel times on cpu"


def test_what_a_peer_does_not_compute_is_refused(tmp_path):
    engine = peers.Engine("cpu")
    with pytest.raises(UnsupportedError, match="plain causal attention alone"):
        measure(engine, case_of("t5", 128), "torch-cudnn", FORWARD, tmp_path)
    with pytest.raises(UnsupportedError, match=r"flash_attn\.cute is not installed"):
        measure(engine, case_of("t5", 128), "flex-fa4", FORWARD, tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="sees no GPU"):
            peers.Engine()
