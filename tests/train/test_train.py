"""A run from the command line: its folder, its refusals, its metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_runs
from tiny_runs import STEPS, command, rows, saved

from attnlab import cli
from attnlab.core.errors import CheckpointError
from attnlab.models.decoder import DecoderConfig
from attnlab.train import loop, metrics
from attnlab.train import recipe as recipes
from attnlab.train.restore import load_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_runs.corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """``(folder, output)`` of a finished run."""
    import contextlib
    import io

    out = tmp_path_factory.mktemp("runs") / "run"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(command(data, out, "--set", "train.sample_tokens=6")) == 0
    return out, printed.getvalue()


def snapshot(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(capsys, code: int, argv: list[str], *says: str) -> None:
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    for text in says:
        assert text in errors[0], errors[0]


def test_run_folder(finished):
    out, printed = finished
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "loss.png", "sample.txt", "checkpoints"
    }
    assert recipes.from_json(out / "config.json").train.steps == STEPS
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert saved(out) == [4, 8, 12], "every 4 steps, the newest 3"
    assert len((out / "sample.txt").read_text()) > 6
    lines = printed.splitlines()
    assert lines[-1].startswith("next: attnlab generate ") and str(out) in lines[-1]
    assert any(line.startswith(f"done: step {STEPS}  loss ") for line in lines)
    meta = json.loads((out / "checkpoints/12/meta/metadata").read_text())
    assert meta["recipe"] == json.loads((out / "config.json").read_text())
    assert meta["layout"] == "stacked" and meta["format"] == 2
    assert json.loads((out / "checkpoints/12/data/metadata").read_text()) == {"step": STEPS}


def test_metrics(finished):
    out, _ = finished
    found = rows(out)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in found] == [64 * s for s in range(1, STEPS + 1)]
    assert [r["step"] for r in found if "val_loss" in r] == [6, 12]
    assert all(r["skipped"] == 0 and r["mfu"] is None for r in found), "no published CPU peak"
    recipe = recipes.from_json(out / "config.json")
    for r in found[3:]:
        per_token = 3 * recipe.model.flops(16) / 16
        assert r["tflops_per_s"] == pytest.approx(r["tokens_per_s"] * per_token / 1e12)
    assert found[-1]["loss"] < found[0]["loss"] and found[-1]["val_loss"] < found[5]["val_loss"]
    bits = found[-1]["val_loss"] / np.log(2)
    assert found[-1]["val_bits_per_byte"] == pytest.approx(bits, rel=0.02)


@pytest.mark.devices8
def test_eval_on_more_devices_than_rows(finished):
    """A run of 4 rows a step on 8 devices: the batch is filled up, the loss is the same."""
    out, _ = finished
    found = []
    for devices in (1, 8):
        done = subprocess.run(
            [sys.executable, "-m", "attnlab", "eval", str(out), "--json"], text=True,
            capture_output=True, env=tiny_runs.environment(devices), timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0]["nats_per_token"] == pytest.approx(found[1]["nats_per_token"], rel=1e-6)
    assert found[0]["tokens"] == found[1]["tokens"]


def test_mfu(monkeypatch):
    """Half the peak of the device is an MFU of 1/2; flops are the layers' own, three passes."""
    model: DecoderConfig = recipes.load("350m").model
    flops = metrics.step_flops(model, 8, 4096)
    assert flops == 3 * 8 * model.flops(4096)
    assert 6 * model.param_count() * 8 * 4096 < flops < 9 * model.param_count() * 8 * 4096

    class Device:
        device_kind = "NVIDIA H200"

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rates = metrics.rates(model, 8, 4096, flops / 989e12 * 2)
    assert rates["mfu"] == pytest.approx(0.5)
    assert rates["tflops_per_s"] == pytest.approx(989 / 2)
    assert metrics.peak_flops("cpu") is None


def test_a_run_is_never_overwritten(finished, data, capsys):
    out, _ = finished
    before = snapshot(out)
    one_line(capsys, 2, command(data, out), "holds a run already", "--resume", "--overwrite")
    # --overwrite of a run that cannot start takes nothing away either.
    one_line(capsys, 2, command(data, out, "--overwrite", "--mesh", "data=3"), "mesh data=3")
    one_line(capsys, 2, command(["--data", "/nowhere"], out, "--overwrite"), "/nowhere")
    one_line(
        capsys, 1, command(data, out, "--overwrite", "--init-from", "/nowhere"), "/nowhere"
    )
    one_line(capsys, 2, command(data, out, "--overwrite", "--impl", "cudnn"), "cudnn: runs on")
    one_line(capsys, 2, command(data, out, "--overwrite", "--profile", "13:14"), "has 12 steps")
    assert snapshot(out) == before


def test_overwrite(finished, data, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "notes.txt").write_text("mine")
    assert cli.main(command(data, out, "--overwrite", "--seed", "5", steps=2)) == 0
    assert [r["step"] for r in rows(out)] == [1, 2] and saved(out) == [2]
    assert not (out / "sample.txt").exists() and (out / "notes.txt").exists()


def test_a_run_that_cannot_start_leaves_nothing(data, tmp_path, capsys):
    out = tmp_path / "run"
    for more, says in (
        (["--mesh", "data=3"], "needs 3 devices but 1 process(es) see 1"),
        (["--mesh", "data=2,fsdp=-1"], "a multiple of 2 devices"),
        (["--accumulate", "3"], "must be a multiple of accumulate = 3"),
        (["--set", "model.vocab_size=100"], "model.vocab_size"),
        (["--impl", "foo"], "impl = 'foo'"),
    ):
        one_line(capsys, 2, command(data, out, *more), says)
    assert not out.exists()


def test_schemes_without_their_package(data, capsys):
    for folder in ("gs://bucket/run", "nosuch://x"):
        for argv in (command(data, folder), ["generate", folder, "--prompt", "x"]):
            one_line(capsys, 2, argv, folder, "attnlab[gcs]")


def test_relative_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(data, "here", steps=1)) == 0
    assert saved(tmp_path / "here") == [1]
    assert cli.main(["train", "--resume", "--steps", "2", "--out", "here", "--plain"]) == 0
    assert saved(tmp_path / "here") == [1, 2] and load_run("here").step == 2


def test_profile(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(command(data, out, "--profile", "2:3", steps=4)) == 0
    assert [p.name for p in (out / "profile").rglob("*.xplane.pb")], "a trace"
    assert "trace written to" in capsys.readouterr().out


def test_tensorboard_is_an_extra(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    argv = command(data, tmp_path / "run", "--tb")
    one_line(capsys, 2, argv, "--tb: needs tensorboardX", 'pip install "attnlab[tb]"')
    assert not (tmp_path / "run").exists()


def test_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboardX")
    assert cli.main(command(data, tmp_path / "run", "--tb", steps=2)) == 0
    assert list((tmp_path / "run" / "tb").glob("events*"))


def test_init_from_takes_the_weights_alone(finished, data, tmp_path, capsys):
    source, out = finished[0], tmp_path / "run"
    assert cli.main(command(data, out, "--init-from", str(source))) == 0
    first, last = rows(out)[0], rows(source)[-1]
    assert first["step"] == 1 and first["lr"] == rows(source)[0]["lr"], "a new run"
    assert first["loss"] < last["loss"] + 0.7 < rows(source)[0]["loss"], "with trained weights"
    # A kill before the first checkpoint does not lose them.
    killed = tmp_path / "killed"
    shutil.copytree(out, killed)
    shutil.rmtree(killed / "checkpoints")
    assert cli.main(["train", "--resume", "--plain", "--out", str(killed)]) == 0
    assert tiny_runs.curve(killed) == tiny_runs.curve(out)
    recipe = recipes.from_json(out / "config.json")
    assert recipe.train.init_from == str(source)
    from attnlab.commands.train import _swap_attention

    assert _swap_attention(recipe, "gqa").train.init_from is None, "weights of another model"
    one_line(capsys, 2, command(data, out, "--overwrite", "--init-from", str(out)), "another --out")
    other = ["--init-from", str(source), "--set", "model.mlp_dim=32"]
    one_line(
        capsys, 1, command(data, tmp_path / "other", *other), "w_down", "shape [1, 16, 16]",
        "[1, 32, 16]",
    )


def test_ten_bad_steps_in_a_row_stop_the_run(data, tmp_path, capsys):
    out = tmp_path / "run"
    argv = command(
        data, out, "--set", "optimizer.name=adamw", "--set", "optimizer.lr=1e30", "--set",
        "optimizer.warmup=0", "--set", "train.eval_every=0", steps=30,
    )
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    (error,) = captured.err.splitlines()
    assert error.startswith("error: loss = ") and "10 steps in a row were not finite" in error
    assert "lower the learning rate" in error
    found = rows(out)
    assert [r["skipped"] for r in found[-9:]] == list(range(1, 10)) and found[-1]["step"] < 30
    assert found[-1]["loss"] is None or found[-1]["grad_norm"] is None, "null, not NaN"
    assert captured.out.count("skipped: loss") == 10, "every one is reported"


def test_a_bad_step_is_reported_and_the_run_goes_on(data, tmp_path, capsys, monkeypatch):
    """The fifth batch has no target: its loss is 0/0."""
    place = loop.place
    calls = []

    def without_targets(batch, sharding):
        calls.append(1)
        if len(calls) == 5:
            batch = batch | {"loss_mask": batch["loss_mask"] * 0}
        return place(batch, sharding)

    monkeypatch.setattr(loop, "place", without_targets)
    out = tmp_path / "run"
    assert cli.main(command(data, out)) == 0
    found = rows(out)
    assert found[4]["loss"] is None and found[5]["loss"] is not None
    assert [r["skipped"] for r in found] == [0] * 4 + [1] * 8
    assert "step      5  skipped" in capsys.readouterr().out


def test_load_run(finished):
    run = load_run(str(finished[0]), step=8)
    assert run.step == 8 and run.recipe.name == "quickstart"
    with pytest.raises(CheckpointError, match=r"has no checkpoint 5 \(found \[4, 8, 12\]\)"):
        load_run(str(finished[0]), step=5)
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        load_run("/nowhere")


def test_a_run_learns_where_documents_end(tmp_path, capsys):
    """Documents of four letters: generation stops after them, long before --tokens."""
    documents = [{"text": "abcd"}] * 300
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    data, out = ["--data", str(tmp_path / "words.jsonl")], tmp_path / "run"
    assert cli.main(command(data, out, "--seed", "1", steps=80)) == 0
    assert rows(out)[-1]["val_loss"] < 0.1
    capsys.readouterr()
    assert cli.main(["generate", str(out), "--prompt", "ab", "--greedy", "--tokens", "30"]) == 0
    assert capsys.readouterr().out.strip() == "abcd"
