"""A stub of gcloud, and a pod of workers behind it (see test_tpu_scripts.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
ZONE = "us-west4-a"

STUB = r"""#!{python} -SE
import fcntl, json, os, pathlib, sys
root = pathlib.Path(os.environ["STUB"])
argv = sys.argv[1:]
lock = open(root / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)  # slices call at the same time
with open(root / "calls", "a") as f:
    f.write(json.dumps(argv) + "\n")

def take(name, default):
    # The next line of a script; the last one stays.
    path = root / name
    if not path.exists():
        return default
    lines = path.read_text().splitlines()
    if len(lines) > 1:
        path.write_text("\n".join(lines[1:]) + "\n")
    return lines[0]

def fail(text, code=1):
    print("ERROR: (gcloud)", text, file=sys.stderr)
    sys.exit(code)

def option(name):
    return next((a.split("=", 1)[1] for a in argv if a.startswith(name + "=")), None)

verb = argv[2:4]
if (root / "fail").exists():
    wanted, code = (root / "fail").read_text().rsplit(" ", 1)
    if wanted in " ".join(argv):
        fail("told to fail", int(code))
if verb == ["queued-resources", "describe"]:
    state = take("states", "ACTIVE")
    if state == "MISSING":
        fail("NOT_FOUND: Resource was not found")
    if state == "ERROR":
        fail("PERMISSION_DENIED: no")
    print(state + "|" + take("request", "v5litepod-16|v2-alpha-tpuv5-lite|||"))
elif verb == ["tpu-vm", "describe"]:
    print(take("node_states", "READY"))
elif verb[0] == "tpu-vm":
    homes = sorted((root / "homes").iterdir())
    if option("--worker") != "all":
        homes = [homes[int(option("--worker"))]]
    code = 0
    if verb[1] == "scp":
        import shutil
        for home in homes:
            shutil.copy(argv[4], home / argv[5].split(":")[1])
    elif "attnlab-status" in option("--command") and (root / "statuses").exists():
        status = take("statuses", None)
        if status == "unreachable":
            fail("ssh: connect timed out", 255)
        for home, word in zip(homes, status.split(",")):
            print("attnlab-status", home.name, "train", word)
    elif (root / "execute").exists():
        import subprocess
        for home in homes:
            env = dict(os.environ, HOME=str(home), WORKER=home.name)
            done = subprocess.run(["bash", "-c", option("--command")], env=env, cwd=home)
            code = code or done.returncode
    sys.exit(code)
"""


class Pod:
    """One test's TPU: the stub's folder, and what the scripts did to it."""

    def __init__(self, root: Path, repo: Path, workers: int = 2):
        self.root, self.repo = root, repo
        self.homes = [root / "homes" / f"w-{i}" for i in range(workers)]
        for home in self.homes:
            home.mkdir(parents=True)
        self.program(root / "bin" / "gcloud", STUB.replace("{python}", sys.executable))
        self.program(root / "bin" / "hostname", "#!/bin/sh\necho $WORKER\n")

    @staticmethod
    def program(path: Path, text: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def script(self, name: str, *lines: str):
        (self.root / name).write_text("".join(line + "\n" for line in lines))

    def __call__(self, name: str, *args: str, code: int | None = 0, env=None, text=""):
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("ATTNLAB_TPU_")},
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "STUB": str(self.root),
            "ATTNLAB_TPU_ZONE": ZONE,
            "ATTNLAB_TPU_LOGS": str(self.root / "logs"),
            **(env or {}),
        }
        done = subprocess.run(
            ["bash", str(self.repo / "tpu_scripts" / f"{name}.sh"), *args],
            env=environment, input=text, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return done

    @property
    def calls(self) -> list[list[str]]:
        path = self.root / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """The calls in short: describe, create, delete, scp, and for ssh what it is about."""
        marks = {"attnlab check": "check", "attnlab-status": "status", "setsid": "start"}
        marks |= {"pip install": "install", "tail -n": "tail"}
        return [
            call[3]
            if call[3] != "ssh"
            else next((v for k, v in marks.items() if k in call[-1]), "ssh")
            for call in self.calls
        ]


def make_repo(path: Path) -> Path:
    shutil.copytree(SCRIPTS, path / "tpu_scripts")
    (path / "old.txt").write_text("1")
    git(path, "init", "-q")
    commit(path)
    return path


def git(path: Path, *args: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    run = subprocess.run(
        ["git", "-C", path, *who, *args], check=True, capture_output=True, text=True
    )
    return run.stdout.strip()


def commit(path: Path):
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "x")
