"""The laboratory without a compiler: what it would compile, prints, keeps and complains about."""

from __future__ import annotations

import dataclasses
import json

import pytest

from attnlab.analysis import aot, golden, gpu_report, lab, lab_table
from attnlab.analysis.targets import find
from attnlab.core.errors import ConfigError, DataError

KERNEL = {
    "name": "x_fwd", "role": "forward", "steps": 8, "cores": 1, "full": 100, "partial": 120,
    "overhead": 60, "row": 300, "spills": 10, "mxu": 0.5, "seconds": 1e-3, "hbm_seconds": 1e-4,
}
(SHAPE,) = lab.shapes_of(["gpt2-small-1k"])


def result(**changes):
    blocks = {"block_q": 512, "block_kv": 512, "block_q_dq": 256}
    row = {
        "target": "v5e", "implementation": "splash", "direction": "forward", "blocks": blocks,
        "shape": dataclasses.asdict(SHAPE), "forced": False, "compile_s": 1.0, "temp_bytes": 2**20,
        "vmem_bytes": 2**21, "kernels": [KERNEL], "kernel_ms": 1.0, "around_ms": 1.0, "ms": 2.0,
        "tflops": 90.0, "peak_share": 0.45, "source": ["default"], "compiler": {"libtpu": "1"},
    }
    return row | changes


def test_candidates():
    v5e = find("v5e")
    used, ours = lab.candidates(v5e, SHAPE, "forward")
    assert (used["implementation"], used["blocks"], used["forced"]) == ("splash", None, False)
    assert (ours["implementation"], ours["blocks"]) == ("tpu", None)
    every = list(lab.candidates(v5e, SHAPE, "forward", ["splash"], blocks=["all"]))
    assert every[0]["blocks"] is None and all(cell["forced"] for cell in every[1:])
    assert {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512} in [
        cell["blocks"] for cell in every
    ]
    one = list(lab.candidates(v5e, SHAPE, "forward", ["xla"], ["block_q=256"]))
    assert [(c["implementation"], c["blocks"]) for c in one] == [
        ("xla", None), ("splash", None), ("splash", {"block_q": 256})
    ], "splash as a call takes it is always there to compare with"
    (vit,) = lab.shapes_of(["vit-l14-257"])
    (refused,) = lab.candidates(v5e, vit, "forward", ["splash"])
    assert refused["error"] == "refused: T = 257 is not a multiple of 128"
    (decode,) = lab.shapes_of(["deepseek-v3-mla-absorbed-4k"])
    (refused,) = lab.candidates(v5e, decode, "backward", ["splash"])
    assert "is a shape of inference" in refused["error"]
    (ours,) = lab.candidates(find("h200"), SHAPE, "forward")
    assert ours["implementation"] == "gpu"
    (cudnn,) = lab.candidates(find("h200"), SHAPE, "forward", ["cudnn"])
    assert cudnn["target"] == "h200" and cudnn["blocks"] is None


@pytest.mark.parametrize("call, message", [
    (lambda: lab.shapes_of(["nope"]), "--shape nope: unknown"),
    (lambda: list(lab.candidates(find("v5e"), SHAPE, "forward", ["nope"])), "--impl nope"),
    (lambda: lab.parse_blocks("a=1,b"), "--blocks a=1,b: is not name=size"),
    (lambda: lab.parse_blocks("a=²"), "is not name=size"),
])
def test_wrong_words(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_shapes_by_tag():
    assert {shape.name for shape in lab.shapes_of(["ci"])} >= {"gpt2-small-1k", "vit-l14-257"}
    assert lab.parse_blocks("a=1,b=22") == {"a": 1, "b": 22}


def test_tables(capsys):
    slow = result(ms=4.0, forced=True, blocks={"block_q": 256, "block_kv": 256})
    bare = {"implementation": "xla", "kernels": [], "unpredicted": "no kernel", "blocks": None}
    lab_table.show(find("v7x"), [slow, result(), result(**bare) | {"ms": 9e9}], "splash", "forward")
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[1].startswith("#  impl") and lines[2].split()[:4] == ["1", "splash", "512", "512"]
    assert lines[2].endswith("1.00") and lines[3].endswith("0.50")
    assert "xla: no prediction: no kernel" in text and "divided by 0.85" in text
    assert "blocks of splash: block_q block_kv" in text and "dq" not in text
    gpu = {"registers": 168, "spill_bytes": 0, "shared_bytes": 2048, "wgmma": 8, "name": "k"}
    row = result(kernels=[gpu], unpredicted="measured, not predicted")
    lab_table.show(find("h200"), [row], "splash", "forward")
    text = capsys.readouterr().out
    assert "168" in text and "kernels of splash: k" in text
    assert "no predicted time: measured" in text


def test_stored_rows_say_what_they_rest_on():
    row = lab.stored(result())
    assert row["basis"] == "predicted (static model), nothing measured" and row["date"]
    json.dumps(row)
    bare = {name: value for name, value in result().items() if name != "ms"}
    assert lab.stored(bare)["basis"] == "compiled, nothing predicted or measured"


def test_golden_rows(tmp_path):
    row = golden.row_of(result())
    assert row["kernels"] == {"x_fwd": {n: KERNEL[n] for n in golden.NUMBERS}} and row["compiled"]
    assert golden.cell_of(row)["shape"] == dataclasses.asdict(SHAPE)
    assert golden.complaints(row, result()) == []
    within = KERNEL | {"full": 105, "partial": 10}
    assert golden.complaints(row, result(kernels=[within])) == []
    slower = KERNEL | {"full": 106, "spills": 11}
    said = golden.complaints(row, result(kernels=[slower]))
    assert said == ["x_fwd: full is 106, was 100 (at most 105)",
                    "x_fwd: spills is 11, was 10 (at most 10)"]
    assert golden.complaints(row, result(kernels=[])) == ["kernel x_fwd is gone"]
    assert golden.complaints(row, {"error": "no"}) == ["no longer compiles: no"]
    path = tmp_path / "golden.json"
    with pytest.raises(DataError, match="write them: attnlab bench attention"):
        golden.load(path)
    path.write_text(json.dumps({"compiler": {"libtpu": "1"}, "rows": [row]}))
    assert golden.load(path)["rows"] == [row]
    with pytest.raises(ConfigError, match="is in no table"):
        golden.cell_of(row | {"shape": "gone"})


def test_writing_golden_rows(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "golden.json"
    monkeypatch.setattr(aot, "run", lambda cells: iter([result()]))
    assert golden.main(path, [find("v5e")]) == 0
    assert golden.load(path)["compiler"] == {"libtpu": "1"}
    monkeypatch.setattr(aot, "run", lambda cells: iter([result() | {"error": "no"}]))
    assert golden.main(path, [find("v5e")]) == 1 and "no" in capsys.readouterr().out


def installed(monkeypatch, **versions):
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(aot, "version", names.get)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(
        aot.importlib.util, "find_spec", lambda name: names.get(name) and object()
    )


@pytest.mark.parametrize("target, versions, message", [
    ("v5e", {"jax": "0.10.2"}, "target v5e: needs libtpu, the TPU compiler"),
    ("v5e", {"jax": "0.12.0.1", "libtpu": "0.0.48.1"}, "this jax needs libtpu >= 0.0.50"),
    ("v5e", {"jax": "0.13", "libtpu": "0.0.42"}, "this jax needs libtpu >= 0.0.50"),
    ("h200", {"jax": "0.10.2"}, "Mosaic GPU kernels need jax >= 0.11.2"),
    ("h200", {"jax": "0.11.2", "jax_cuda13_plugin": "0.11.2"}, "needs jax-cuda13-pjrt, nvidia"),
    ("h200", {"jax": "0.11.2", **dict.fromkeys(
        (name.replace("-", "_") for name in aot.CUDA_WHEELS), "0.12.0")}, "must be the same"),
])
def test_missing_compilers(target, versions, message, monkeypatch):
    installed(monkeypatch, **versions)
    with pytest.raises(ConfigError, match=message):
        aot.require(find(target))


def test_fitting_compilers(monkeypatch):
    installed(monkeypatch, jax="0.10.2", libtpu="0.0.52")
    aot.require(find("v5e"))
    assert [t.name for t in lab.installed()] == ["v4", "v5e", "v5p", "v6e", "v7x"]
    installed(monkeypatch, jax="0.10.2")
    with pytest.raises(ConfigError):
        lab.installed()


def test_environment():
    variables = aot.environment(find("v6e"), "reports")
    assert variables["JAX_PLATFORMS"] == "cpu" and "--xla_jf_dump_to=reports" in (
        variables["LIBTPU_INIT_ARGS"]
    )
    assert aot.environment(find("h200"), "reports")["MOSAIC_GPU_DUMP_TO"] == "reports"


PTXAS = """ptxas info    : Compiling entry function 'my_kernel' for 'sm_90a'
ptxas info    : Function properties for my_kernel
    8 bytes stack frame, 24 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""


def test_ptxas_reports(tmp_path):
    assert gpu_report.read(tmp_path) == []
    (tmp_path / "a.ptxas").write_text(PTXAS)
    (tmp_path / "a.ptx").write_text("wgmma.mma_async.sync x;\nwgmma.mma_async.sync y;\n")
    assert gpu_report.read(tmp_path) == [{
        "name": "my_kernel", "registers": 168, "spill_bytes": 40, "shared_bytes": None, "wgmma": 2,
    }]
    with pytest.raises(DataError, match="names no registers"):
        gpu_report.parse("b", "", "")
