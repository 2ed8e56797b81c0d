"""Tuning without a compiler or an accelerator: choices, tables, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from attnlab import cli
from attnlab.analysis import aot, lab, tune
from attnlab.analysis.targets import find
from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.errors import ConfigError, ImplementationError
from attnlab.ops.attention import OP, attention, gpu_sizes, tuning, xla
from attnlab.ops.attention.gpu_backward_wide import Config as Wide
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


WIDE = Shape("wide", 1, 256, 2, 1, 128, 128)
H200 = Device("gpu", "NVIDIA H200")


@pytest.fixture
def hopper(monkeypatch):
    """XLA in place of the Hopper kernels, with their sizes; returns the sizes of each trace."""
    seen = []

    def forward(q, k, v, **facts):
        sizes = gpu_sizes.Sizes.of(q, v, facts["mask"], facts["layout"], None, False)
        seen.append({"forward": sizes.forward, "backward": sizes.backward})
        return xla.forward(q, k, v, **facts)

    stub = dataclasses.replace(
        OP.implementations["gpu"], supports=lambda call: None, forward=forward
    )
    monkeypatch.setitem(OP.implementations, "gpu", stub)
    return seen


def clocked(seen):
    """A timer by the sizes in use: wide kernels gain a quarter each, persistent ones an eighth, the
    forward likes 64 keys."""

    def timer(run, args):
        forward, backward = seen[-1]["forward"], seen[-1]["backward"]
        ms = [1.0 if forward.block_k == 64 else 2.0]
        if len(args) == 4:
            for config, each in zip(backward, (2.0, 4.0)):
                each *= 0.75 if isinstance(config, Wide) else 1.0
                ms.append(each * (0.875 if getattr(config, "persistent", 0) else 1.0))
            ms.append(0.1 * sum(config.stages != 3 for config in backward))
        return sum(ms) / 1e3

    return timer


def test_hopper_rows(hopper, tmp_path, monkeypatch, capsys):
    """Measured on a device that is not here, written, and read by the next call."""
    with compiling_for(H200):
        timed = tune.measured(H200, [WIDE], ["gpu"], clocked(hopper))
        assert tune.write(tmp_path, H200.kind, timed) == 2
    tried = len(hopper)
    found = json.loads((tmp_path / "nvidia_h200.json").read_text())
    rows = {row["direction"]: row for row in found["rows"]}
    assert {row["basis"] for row in found["rows"]} == {"measured"}
    assert rows["forward"]["ms"] == 1.0 and rows["forward"]["blocks"]["block_k"] == 64
    # The forward beside it is the heuristic's: the table is not read before it is the package's.
    assert rows["backward"]["ms"] == 2.0 + 1.5 * 0.875 + 3.0
    winner = rows["backward"]["blocks"]
    assert winner["wide_dq"] and winner["persistent_dq"], "persistent beside the best sizes"
    assert winner["wide_dkv"] and not winner["persistent_dkv"], "dk, dv beside the best dq"
    offered = [
        tuning.space("gpu").candidates(lab.key_of(WIDE, "gpu", d)) for d in tuning.DIRECTIONS
    ]
    assert tried == sum(map(len, offered)) - 1, "one that does not fit was not run; no product"
    out = capsys.readouterr().out
    assert "6.312 ms measured, the heuristic 8.000 ms" in out
    assert "8.000  1.000        the heuristic" in out
    assert any(line.startswith("6.312  0.789") and "wide_dkv=1" in line
               for line in out.splitlines())
    assert "persistent_dkv = 1: the kernel of wide_dkv has no such thing" in out

    monkeypatch.setattr(tuning, "table", lambda kind: tuple(found["rows"]))
    x = jnp.zeros((1, 300, 2, 128), jnp.bfloat16)
    with compiling_for(H200):
        jax.eval_shape(lambda x: attention(x, x, x, impl="gpu"), x)
    assert hopper[-1]["forward"].block_k == 64
    assert all(isinstance(config, Wide) for config in hopper[-1]["backward"])


def test_what_gpu_leaves_out(hopper, capsys):
    """Calls that no tuned row serves."""
    cap = dataclasses.replace(WIDE, name="cap", logit_cap=5.0)
    with compiling_for(H200):
        assert not list(tune.measured(H200, [cap], ["gpu"], clocked(hopper)))
    out = capsys.readouterr().out
    assert "gpu cap: left out: it has a logit cap, and tuned rows serve calls without" in out
    assert not hopper, "nothing was run for it"


def test_a_lone_candidate_is_not_timed(here, capsys):
    here()
    short = dataclasses.replace(TINY, T=100)
    with compiling_for(TOY_DEVICE):
        assert not list(tune.measured(TOY_DEVICE, [short], ["toy"], lambda run, args: 1.0))
    assert "toy forward tiny: nothing to choose, only the heuristic fits" in capsys.readouterr().out


def test_rows_of_every_shape_are_found_again():
    """The key that a row is written for is that of the call, else nothing ever reads it."""
    for shape in lab.SHAPES:
        call = shape.call(H200)
        if max(shape.H, shape.V) > 256:
            continue
        q, v = (
            jax.ShapeDtypeStruct((shape.B, shape.T, *x), jnp.bfloat16)
            for x in ((shape.N, shape.H), (shape.K, shape.V))
        )
        asked = gpu_sizes.Sizes.of(q, v, call.mask, call.layout, None, False).key
        assert asked == lab.key_of(shape, "gpu", "forward"), shape.name


def test_the_budget_ends_between_passes(here, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tune.time, "perf_counter", lambda: now[0])

    def timer(run, args):
        now[0] += 70
        return 1.0

    here()
    with compiling_for(TOY_DEVICE):
        rows = list(tune.measured(TOY_DEVICE, [TINY], ["toy"], timer, limit_s=120))
    assert [row["direction"] for row in rows] == ["forward"], "what has begun is finished"
    out = capsys.readouterr().out
    assert "the budget of 2 minutes is spent, left out: toy backward tiny" in out


def test_sizes_that_change_together_are_one_group():
    usual = {"a": 1, "b": 1, "c": 1, "d": 1}
    found = tune.independent(usual, [
        usual, usual | {"a": 2}, usual | {"d": 2}, usual | {"b": 3}, usual | {"c": 2},
        usual | {"a": 4, "b": 4},
    ])
    assert found == [[{}], [{"a": 2}, {"b": 3}, {"a": 4, "b": 4}], [{"d": 2}], [{"c": 2}]]


def test_changes_that_do_not_fit_each_other(here, monkeypatch, capsys):
    """The second is tried beside the best of the first; refused there, it is said, not run."""
    space = tuning.Space(
        lambda key: {"size": 64, "flag": 0},
        lambda key: [{"size": s, "flag": f} for s, f in ((64, 0), (128, 0), (64, 1))],
        lambda key, b: "no room for both" if b["flag"] and b["size"] > 64 else None,
        lambda role, blocks: tuning.Tile(blocks["size"], blocks["size"]),
    )
    monkeypatch.setitem(tuning.SPACES, "toy", space)
    lone, times = dataclasses.replace(TINY, tags=("forward_only",)), iter([2.0, 1.0])
    here()
    with compiling_for(TOY_DEVICE):
        (row,) = tune.measured(TOY_DEVICE, [lone], ["toy"], lambda run, args: next(times))
    assert row["blocks"] == {"size": 128, "flag": 0}
    assert any("size=128 flag=1" in line and line.endswith("no room for both")
               for line in capsys.readouterr().out.splitlines())


def test_a_candidate_that_fails_is_said(here, capsys):
    """The others go on, and the table has its error."""

    def picky(q, k, v, **facts):
        if tuning.choose(tuning.Key.of("toy", "forward", q, k, v, facts["mask"])).blocks == {
            "size": 128
        }:
            raise ValueError("no room\nfor it")
        return xla.forward(q, k, v, **facts)

    here(result=picky)
    times = iter([3.0, 4.0])
    with compiling_for(TOY_DEVICE):
        rows = tune.measured(TOY_DEVICE, [TINY], ["toy"], lambda run, args: next(times))
        assert next(rows)["blocks"] == {"size": 64}
    assert any(line.startswith("-") and "size=128" in line and line.endswith("no room")
               for line in capsys.readouterr().out.splitlines())


def test_wrong_kernels_are_not_timed(here):
    def wrong(q, k, v, **facts):
        out, lse = xla.forward(q, k, v, **facts)
        return out * 1.5, lse

    here(result=wrong)
    with compiling_for(TOY_DEVICE), pytest.raises(ImplementationError, match="differs from XLA"):
        list(tune.measured(TOY_DEVICE, [TINY], ["toy"], lambda run, args: 1.0))


def test_timing_of_a_call():
    assert 0 < tune.seconds(jax.jit(lambda x: x + 1), [jnp.zeros(8)]) < 1


@pytest.mark.parametrize("command, wanted", [
    ("tune", ("on a CPU", "pass --target v5e")),
    ("tune --target h200", ("no time model", "on that GPU without --target")),
    ("tune --target v9", ("target = 'v9'", "use one of v4")),
    ("tune --target v5e --shape nope", ("--shape nope", "unknown", "gpt2-small-1k")),
    ("tune --target v5e --impl xla", ("'xla'", "no block sizes", "splash")),
    ("tune --target v5e --all-targets", ("not allowed with",)),
    ("tune --target v5e --budget 5", ("--budget 5 with a target", "measuring here")),
    ("tune --budget 0", ("--budget 0: is how many minutes", "give minutes")),
    ("tune --budget soon", ("'soon' is not a number",)),
])
def test_wrong_command_lines(command, wanted, capsys, tmp_path):
    code = cli.main([*command.split(), "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert code == 2 and all(part in err for part in wanted), err
    assert not list(tmp_path.iterdir())
