"""Tuning without a compiler or an accelerator: choices, tables, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from attnlab import cli
from attnlab.analysis import aot, lab, tune
from attnlab.analysis.targets import find
from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.errors import ConfigError, ImplementationError
from attnlab.ops.attention import OP, tuning, xla
from attnlab.ops.attention.shapes import Shape

(GPT2,) = lab.shapes_of(["gpt2-small-1k"])
TINY = Shape("tiny", 1, 256, 2, 1, 64, 64)
TOY_DEVICE = Device("toy", "Toy 1")


def test_best():
    a, b = {"block_q": 512}, {"block_q": 1024}
    assert tune.best([tune.Trial(a, 1.0, 9), tune.Trial(b, 1.009, 1)]).blocks == b, "less VMEM"
    assert tune.best([tune.Trial(a, 1.0, 9), tune.Trial(b, 1.02, 1)]).blocks == a
    assert tune.best([tune.Trial(a, None, error="no"), tune.Trial(b, 3.0)]).blocks == b
    assert tune.best([tune.Trial(a, None)]) is None and tune.best([]) is None


def compiled(cells):
    """Forward likes 1024 rows, backward 512; the largest tiles do not compile."""
    for cell in cells:
        blocks = cell["blocks"]
        if blocks.get("block_kv") == 1024 and blocks["block_kv_compute"] == 1024:
            yield cell | {"error": "out of on-chip memory"}
            continue
        size = blocks.get("block_q", blocks.get("block_q_dq"))
        kernels = [{"role": "forward", "seconds": 1e-3 * 512 / blocks.get("block_q", 512)}]
        kernels += [{"role": role, "seconds": 1e-6 * size} for role in ("dq", "dkv")]
        yield cell | {"kernels": kernels, "vmem_bytes": None, "compiler": {"libtpu": "1"}}


def test_predicted_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(aot, "run", compiled)
    rows = list(tune.predicted(find("v5e"), [GPT2], ["splash"]))
    times = [(row["direction"], row["ms"]) for row in rows]
    assert times == [("forward", 0.5), ("backward", 1.024)]
    assert rows[0]["blocks"]["block_q"] == 1024 and rows[1]["blocks"]["block_q_dq"] == 512
    assert all(row["basis"] == "predicted" and row["versions"] == {"libtpu": "1"} for row in rows)
    out = capsys.readouterr().out
    assert "0.500 ms predicted, the heuristic 1.000 ms" in out
    assert tune.write(tmp_path, "TPU v5 lite", iter(rows)) == 2
    faster = rows[0] | {"ms": 0.4}
    other = rows[0] | {"T": 2048, "S": 2048}
    assert tune.write(tmp_path, "TPU v5 lite", iter([faster, other])) == 2
    found = json.loads((tmp_path / "tpu_v5_lite.json").read_text())
    assert found["device"] == "TPU v5 lite" and len(found["rows"]) == 3
    assert sorted(row["ms"] for row in found["rows"]) == [0.4, 0.5, 1.024]
    (tmp_path / "toy.json").write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read"):
        tune.write(tmp_path, "toy", iter(rows))


def toy(result=xla.forward, seen=None):
    """An implementation for a device that is here: XLA, with a block size that changes nothing."""

    def forward(q, k, v, **facts):
        for direction in tuning.DIRECTIONS:
            choice = tuning.choose(tuning.Key.of("toy", direction, q, k, v, facts["mask"]))
            if seen is not None:
                seen.append(choice.blocks["size"])
        return result(q, k, v, **facts)

    return dataclasses.replace(OP.implementations["xla"], name="toy", forward=forward)


@pytest.fixture
def here(monkeypatch):
    """The toy implementation, registered; returns a function that installs its forward pass."""
    space = tuning.Space(
        lambda key: {"size": 64}, lambda key: [{"size": s} for s in (64, 128, 512)],
        lambda key, blocks: "too big" if blocks["size"] > key.T else None,
        lambda role, blocks: tuning.Tile(blocks["size"], blocks["size"]),
    )
    monkeypatch.setitem(tuning.SPACES, "toy", space)
    monkeypatch.setitem(OP.order, "toy", ("toy", "xla"))
    return lambda **how: monkeypatch.setitem(OP.implementations, "toy", toy(**how))


def test_measured_rows(here):
    seen, times = [], iter([3.0, 2.0, 5.0, 6.0])
    here(seen=seen)
    with compiling_for(TOY_DEVICE):
        rows = list(tune.measured(TOY_DEVICE, [TINY], ["toy"], lambda run, args: next(times)))
    assert [(r["direction"], r["blocks"]["size"], r["ms"]) for r in rows] == [
        ("forward", 128, 2000.0), ("backward", 64, 5000.0)
    ]
    assert {64, 128} == set(seen), "forced, the size that does not fit is never tried"
    assert all(row["basis"] == "measured" and row["versions"]["jax"] for row in rows)


def test_wrong_kernels_are_not_timed(here):
    def wrong(q, k, v, **facts):
        out, lse = xla.forward(q, k, v, **facts)
        return out * 1.5, lse

    here(result=wrong)
    with compiling_for(TOY_DEVICE), pytest.raises(ImplementationError, match="differs from XLA"):
        list(tune.measured(TOY_DEVICE, [TINY], ["toy"], lambda run, args: 1.0))


def test_timing_of_a_call():
    import jax
    import jax.numpy as jnp

    assert 0 < tune.seconds(jax.jit(lambda x: x + 1), [jnp.zeros(8)]) < 1


@pytest.mark.parametrize("command, wanted", [
    ("tune", ("on a CPU", "pass --target v5e")),
    ("tune --target h200", ("no time model", "on that GPU without --target")),
    ("tune --target v9", ("target = 'v9'", "use one of v4")),
    ("tune --target v5e --shape nope", ("--shape nope", "unknown", "gpt2-small-1k")),
    ("tune --target v5e --impl xla", ("'xla'", "no block sizes", "splash")),
    ("tune --target v5e --all-targets", ("not allowed with",)),
])
def test_wrong_command_lines(command, wanted, capsys, tmp_path):
    code = cli.main([*command.split(), "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert code == 2 and all(part in err for part in wanted), err
    assert not list(tmp_path.iterdir())
