"""Going on: bit for bit, after SIGTERM, past damaged checkpoints, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import sys

import pytest
import tiny_runs
from tiny_runs import STEPS, checksums, command, curve, rows, saved

from attnlab import cli
from attnlab.train import trackers

sys.path.insert(0, str(tiny_runs.ROOT / "experiments"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(None):
        assert cli.main(command(data, out)) == 0
    return out


@pytest.fixture
def cut(whole, tmp_path):
    """A copy that has lost everything after step 8 but its rows, as a kill leaves it."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "12")
    (out / "loss.png").unlink()
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text[:-20])  # the last row half written
    return out


def resume(out, *more: str) -> int:
    return cli.main(["train", "--resume", "--plain", "--out", str(out), *more])


def assert_whole(out, whole) -> None:
    """Rows and state are those of the run that nothing interrupted, bit for bit."""
    assert curve(out) == curve(whole)
    assert checksums(out) == checksums(whole)
    assert (out / "loss.png").exists() and saved(out)[-1] == STEPS


def refused(capsys, out, *more: str, says: tuple[str, ...]) -> None:
    before = (out / "metrics.jsonl").read_bytes(), saved(out), (out / "config.json").read_bytes()
    capsys.readouterr()
    assert resume(out, *more) == 1
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1 and all(text in errors[0] for text in says), errors
    assert before == (
        (out / "metrics.jsonl").read_bytes(), saved(out), (out / "config.json").read_bytes()
    )


def test_bit_for_bit(whole, cut, capsys):
    assert resume(cut) == 0
    assert f"resumed {cut} at step 8" in capsys.readouterr().out
    assert_whole(cut, whole)


def test_with_another_schedule_of_saves(whole, cut):
    more = "--checkpoint-every 5 --log-every 1 --eval-every 6".split()
    assert resume(cut, *more, "--set", "model.remat=full") == 0
    assert curve(cut)[:8] == curve(whole)[:8] and 10 in saved(cut)
    for a, b in zip(curve(cut), curve(whole), strict=True):
        assert a[2:4] == pytest.approx(b[2:4], rel=1e-5)
    assert json.loads((cut / "config.json").read_text())["train"]["checkpoint_every"] == 5


def test_before_the_first_checkpoint(whole, cut, capsys):
    shutil.rmtree(cut / "checkpoints")
    assert resume(cut) == 0
    assert "no complete checkpoint: from the first step" in capsys.readouterr().out
    assert_whole(cut, whole)


def test_a_finished_run_stays_as_it_is(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert resume(out) == 0
    assert_whole(out, whole)
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: ")


@pytest.mark.parametrize("at", [1, 5, 8])
def test_sigterm_saves_and_leaves(at, whole, data, tmp_path, capsys, monkeypatch):
    """The signal comes while step ``at`` is logged; the step that runs then is saved."""
    log = trackers.JsonLines.log

    def and_signal(self, row):
        log(self, row)
        if row["step"] == at and not os.environ.get("ATTNLAB_TEST_SIGNALLED"):
            os.environ["ATTNLAB_TEST_SIGNALLED"] = "1"
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trackers.JsonLines, "log", and_signal)
    monkeypatch.setenv("ATTNLAB_TEST_SIGNALLED", "")
    out = tmp_path / "run"
    assert cli.main(command(data, out)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("SIGTERM: saved step ") and f"--resume --out {out}" in last
    step = saved(out)[-1]
    assert at <= step <= at + 3 and f"step {step} " in last
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert resume(out) == 0
    assert_whole(out, whole)


# Damage.


def data_files(step: pathlib.Path) -> list[pathlib.Path]:
    """Files that hold array bytes, the largest first."""
    files = [p for p in (step / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(files, key=lambda p: p.stat().st_size)[::-1]


def flip(step):
    for path in data_files(step):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2 :: 400] = bytes(x ^ 0x10 for x in raw[len(raw) // 2 :: 400])
        path.write_bytes(raw)


def truncate(step):
    for path in data_files(step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lie(step):
    """Everything can be read, one array is another one's."""
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["checksums"]["['params']['final_norm']"] += 1
    path.write_text(json.dumps(meta))


DAMAGE = {
    "flip": flip, "truncate": truncate, "lie": lie,
    "no state": lambda s: shutil.rmtree(s / "state"),
    "no manifest": lambda s: (s / "state" / "manifest.ocdbt").unlink(),
    "no meta": lambda s: (s / "meta" / "metadata").unlink(),
    "cut meta": lambda s: (s / "meta" / "metadata").write_text("{"),
    "no data": lambda s: shutil.rmtree(s / "data"),
    "empty meta": lambda s: (s / "meta" / "metadata").write_text("{}"),
    "half a meta": lambda s: (s / "meta" / "metadata").write_text('{"format": 1}'),
    "data of another kind": lambda s: (s / "data" / "metadata").write_text("[]"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(how, whole, cut, capsys):
    DAMAGE[how](cut / "checkpoints" / "8")
    assert resume(cut) == 0
    out = capsys.readouterr().out
    assert "warning: checkpoint 8 in " in out and " is damaged: " in out, out
    assert f"resumed {cut} at step 4" in out
    assert_whole(cut, whole)
    assert (cut / "checkpoints" / "damaged-8").is_dir() and saved(cut) == [4, 8, 12]


def test_a_checkpoint_without_its_commit_mark(whole, cut, capsys):
    """What counts on an object store; orbax does not list such a step."""
    for path in (cut / "checkpoints" / "8").rglob("commit_success.txt"):
        path.unlink()
    (cut / "checkpoints" / "8" / "_CHECKPOINT_METADATA").unlink()
    assert resume(cut) == 0
    assert "resumed" in capsys.readouterr().out
    assert_whole(cut, whole)


def test_a_half_written_checkpoint_is_reported(whole, cut, capsys):
    saves = cut / "checkpoints"
    (saves / "8").rename(saves / "8.orbax-checkpoint-tmp")
    data_files(saves / "8.orbax-checkpoint-tmp")[0].unlink()
    assert resume(cut) == 0
    out = capsys.readouterr().out
    assert "8.orbax-checkpoint-tmp was not completely written: left out" in out
    assert f"resumed {cut} at step 4" in out
    assert_whole(cut, whole)
    assert not list(saves.glob("*tmp*"))


def test_all_damaged(cut, capsys):
    for step in (4, 8):
        flip(cut / "checkpoints" / str(step))
    for _ in range(2):  # the second time is no fresh start
        refused(capsys, cut, says=("every checkpoint ([4, 8]) is damaged", "--overwrite"))


@pytest.mark.parametrize("how", ["flip", "lie", "half a meta", "no state"])
def test_reading_past_a_damaged_checkpoint(how, cut, capsys):
    """The newest good one is read and the other one reported, unless it is asked for by name."""
    DAMAGE[how](cut / "checkpoints" / "8")
    argv = ["generate", str(cut), "--prompt", "x", "--tokens", "2", "--greedy"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "warning: checkpoint 8 in " in err and "is damaged" in err
    assert cli.main([*argv, "--step", "4"]) == 0 and capsys.readouterr().out == out
    assert cli.main([*argv, "--step", "8"]) == 1
    (error,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert "checkpoint 8 in " in error and "is damaged" in error and "[4]" in error
    assert saved(cut) == [4, 8], "reading changes nothing"


def test_a_damaged_row(whole, cut, capsys):
    path = cut / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], '{"step": 16, "los\n', *lines[3:]]))
    assert resume(cut) == 0
    assert "note: " in (err := capsys.readouterr().err) and "line 4 is damaged: left out" in err
    assert_whole(cut, whole)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_the_start(overwrite, whole, data, tmp_path, monkeypatch):
    """As soon as there is a folder, it can be resumed; with --overwrite under the new recipe."""
    from attnlab.train import checkpoint

    out = tmp_path / "run"
    if overwrite:
        assert cli.main(command(data, out, "--seed", "7", steps=4)) == 0

    def killed(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(checkpoint.Checkpoints, "_open", killed)  # the first that touches the folder
        assert cli.main(command(data, out, *["--overwrite"] * overwrite)) == 130
    assert resume(out) == 0
    assert_whole(out, whole)


# What may not change.


def test_another_corpus(cut, data, tmp_path, capsys):
    other = pathlib.Path(data[1]).read_text().replace("quick", "quack")
    (tmp_path / "train.txt").write_text(other)
    says = ("corpus fingerprint", "pass the same corpus")
    refused(capsys, cut, "--data", str(tmp_path / "train.txt"), says=says)


def test_a_moved_corpus(whole, cut, data, tmp_path):
    for path in (data[1], data[3]):
        shutil.copy(path, tmp_path)
    moved = [str(tmp_path / pathlib.Path(path).name) for path in (data[1], data[3])]
    assert resume(cut, "--data", moved[0], "--val-data", moved[1]) == 0
    assert_whole(cut, whole)


@pytest.mark.parametrize(
    "change", ["model.mlp_dim=32", "model.period.0.num_heads=4", "optimizer.lr=0.5",
               "train.batch=8", "data.seed=3", "model.precision.compute=bfloat16"]
)
def test_another_model(change, cut, capsys):
    refused(capsys, cut, "--set", change, says=(change.split("=")[0], "the run was started with"))


def test_more_steps(whole, cut, capsys):
    assert resume(cut, "--steps", "16") == 0
    out = capsys.readouterr().out
    assert "train.steps = 16 instead of 12" in out and "learning rates of a run of 16" in out
    assert [r["step"] for r in rows(cut)] == list(range(1, 17)) and saved(cut)[-1] == 16
    assert curve(cut)[:8] == curve(whole)[:8]
    assert rows(cut)[9]["lr"] > rows(whole)[9]["lr"], "the decay moved"
    assert resume(cut) == 0, "the new length is the run's from now on"
    assert rows(cut)[-1]["step"] == 16


def test_fewer_steps_than_taken(cut, capsys):
    assert resume(cut, "--steps", "5") == 1
    assert "the run has taken 8 steps already" in capsys.readouterr().err


def test_nothing_to_resume(tmp_path, capsys):
    assert resume(tmp_path / "none") == 1
    assert "holds no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.heavy
def test_kills(tmp_path):
    """Three SIGKILLs, one of them during a save (the experiment does ten)."""
    import kill_resume

    argv = command(tiny_runs.corpus(tmp_path), "unused", "--checkpoint-every", "5", steps=40)
    del argv[argv.index("--out") : argv.index("--out") + 2]
    recipe = [word for word in argv[1:] if word != "--plain"]
    env = tiny_runs.environment()
    result = kill_resume.experiment(tmp_path, kills=3, env=env, recipe=recipe)
    assert [trial["same"] for trial in result["trials"]] == [True] * 3, result
    assert any(trial["during_save"] for trial in result["trials"])
