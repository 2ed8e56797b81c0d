"""Two processes on one machine (gloo): the same curve, no hang, both resume."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time

import pytest
import tiny_runs
import two_processes
from tiny_runs import STEPS, command, curve, rows, saved

from attnlab import cli
from attnlab.core.errors import MeshError
from attnlab.parallel import processes

pytestmark = pytest.mark.heavy
LONG = 4000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """One process, one device."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    with contextlib.redirect_stdout(None):
        assert cli.main(command(data, out)) == 0
    return out


@pytest.fixture(scope="module")
def together(tmp_path_factory, data):
    """``(folder, outputs)`` of two processes with two devices each, sharded over both."""
    out = tmp_path_factory.mktemp("runs") / "together"
    argv = command(data, out, "--mesh", "data=2,fsdp=2", "--set", "train.sample_tokens=4")
    codes, texts = two_processes.finish(two_processes.start(argv))
    assert codes == [0, 0], texts
    return out, texts


def assert_close(out, want, rel=1e-5):
    got, want = curve(out), curve(want)
    assert [r[0] for r in got] == [r[0] for r in want]
    for a, b in zip(got, want, strict=True):
        assert a[2:4] == pytest.approx(b[2:4], rel=rel) and (a[5] is None) == (b[5] is None)
        assert a[5] is None or a[5] == pytest.approx(b[5], rel=rel)


def test_same_curve_as_one_process(alone, together):
    out, texts = together
    assert_close(out, alone, 2e-5)
    assert "2 process(es)" in texts[0] and "mesh: data=2,fsdp=2" in texts[0]
    assert "loss" in texts[0] and "loss" not in texts[1], "the second one is silent"
    assert "Involuntary full rematerialization" not in texts[0], "no activation is gathered whole"
    assert (out / "sample.txt").exists() and saved(out) == [4, 8, 12]


def test_both_resume_and_so_does_one(alone, together, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(together[0], both)
    shutil.rmtree(both / "checkpoints" / "12")
    one = tmp_path / "one"
    shutil.copytree(both, one)
    codes, texts = two_processes.finish(
        two_processes.start(["train", "--resume", "--plain", "--out", str(both)])
    )
    assert codes == [0, 0] and "at step 8" in texts[0], texts
    assert curve(both) == curve(together[0]), "bit for bit on the same mesh"
    assert cli.main(
        ["train", "--resume", "--plain", "--out", str(one), "--set", "train.mesh=None"]
    ) == 0
    assert_close(one, alone, 2e-5)


def test_a_damaged_shard_is_passed_over_by_both(together, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(together[0], out)
    files = [p for p in (out / "checkpoints" / "12" / "state").rglob("*") if p.parent.name == "d"]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    codes, texts = two_processes.finish(
        two_processes.start(["train", "--resume", "--plain", "--out", str(out)])
    )
    assert codes == [0, 0], texts
    assert "checkpoint 12 in" in texts[0] and "at step 8" in texts[0], texts
    assert curve(out) == curve(together[0])


def test_sigterm_on_one_saves_on_both(data, tmp_path):
    out = tmp_path / "run"
    argv = command(data, out, "--set", "train.eval_every=0", "--mesh", "fsdp=-1", steps=LONG)
    both = two_processes.start(argv)
    two_processes.wait_for_row(out, 5, both)
    os.kill(both[1].pid, signal.SIGTERM)
    codes, texts = two_processes.finish(both)
    assert codes == [0, 0], texts
    assert "SIGTERM: saved step " in texts[0] and "--resume" in texts[0]
    last = saved(out)[-1]
    assert 5 <= last < LONG and rows(out)[-1]["step"] == last
    more = ["train", "--resume", "--plain", "--out", str(out), "--steps", str(last + 3)]
    codes, texts = two_processes.finish(two_processes.start(more))
    assert codes == [0, 0] and f"at step {last}" in texts[0], texts


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_stops_the_other(victim, data, tmp_path):
    out = tmp_path / "run"
    argv = command(data, out, "--set", "train.eval_every=0", "--mesh", "fsdp=-1", steps=LONG)
    both = two_processes.start(argv)
    two_processes.wait_for_row(out, 9, both)
    os.kill(both[victim].pid, signal.SIGKILL)
    started = time.monotonic()
    codes, texts = two_processes.finish([both[1 - victim]], 90)
    assert time.monotonic() - started < 60, "an end, and soon"
    assert codes[0] not in (0, -signal.SIGKILL), texts
    assert "error" in texts[0].lower(), texts[0]
    both[victim].communicate()
    more = ["train", "--resume", "--plain", "--out", str(out), "--steps", str(LONG)]
    again = two_processes.start(more)
    try:
        two_processes.wait_for_row(out, saved(out)[-1] + 2, again)
    finally:
        for process in again:
            process.kill()
        two_processes.finish(again, 5)


def test_what_does_not_fit_is_refused(data, tmp_path, monkeypatch, capsys):
    argv = command(data, tmp_path / "run", "--mesh", "data=3")
    codes, texts = two_processes.finish(two_processes.start(argv))
    assert codes == [2, 2]
    for text in texts:
        (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "mesh data=3: needs 3 devices but 2 process(es) see 4" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(MeshError, match="JAX_PROCESS_ID missing"):
        processes.start()
    assert STEPS == 12
