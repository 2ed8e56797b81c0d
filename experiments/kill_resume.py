"""Is a run that was killed and resumed the run that nothing interrupted?

Trains one recipe undisturbed, then again and again with one SIGKILL each, at its very start, at a
random step or while a checkpoint is being written, resumes it, and compares every logged number
and the checksum of every array of the last checkpoint. Trials already in the results file are not
repeated.

    python experiments/kill_resume.py --out /tmp/kills
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "kill_resume.json"
COMPARED = ("step", "loss", "val_loss", "grad_norm", "lr", "skipped")
RECIPE = [
    "quickstart", "--steps", "120", "--batch", "4", "--seq-len", "64", "--log-every", "1",
    "--eval-every", "30", "--checkpoint-every", "10", "--set", "model.repeats=2", "--set",
    "model.mlp_dim=128", "--set", "train.eval_rows=16", "--set", "train.sample_tokens=0",
]


def rows(out: pathlib.Path) -> list[dict]:
    """The complete lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def numbers(out: pathlib.Path) -> list[list]:
    return [[row.get(name) for name in COMPARED] for row in rows(out)]


def checksums(out: pathlib.Path) -> dict:
    """Of the arrays in the newest checkpoint."""
    steps = [int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit()]
    meta = out / "checkpoints" / str(max(steps)) / "meta" / "metadata"
    return {"step": max(steps), **json.loads(meta.read_text())["checksums"]}


def start(out: pathlib.Path, arguments: list[str], env: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "attnlab", "train", *arguments, "--plain", "--out", str(out)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


def finish(process: subprocess.Popen, limit: float) -> str:
    text, _ = process.communicate(timeout=limit)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{text}")
    return text


def half_written(out: pathlib.Path) -> list[str]:
    folder = out / "checkpoints"
    return [p.name for p in folder.glob("*.orbax-checkpoint-tmp")] if folder.exists() else []


def run_until_killed(out, recipe, env, at: int | None, limit: float) -> dict | None:
    """Kill once step ``at`` is logged (None: while a save is under way); None if too late."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(out, recipe, env)
    deadline = time.monotonic() + limit
    metrics = out / "metrics.jsonl"
    wait_for = random.Random(str(out)).randrange(3)  # the save to hit
    seen: set[str] = set()
    while process.poll() is None and time.monotonic() < deadline:
        if at is None:
            seen |= set(half_written(out))
            if len(seen) > wait_for:
                break
        elif (at == 0 and (out / "config.json").exists()) or (
            at > 0 and metrics.exists() and metrics.read_bytes().count(b"\n") >= at
        ):
            break
        time.sleep(0.002)
    late = process.poll() is not None
    if not late:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    left = half_written(out)
    if late or (at is None and not left):
        return None
    found = rows(out)
    return {"last_row": found[-1]["step"] if found else 0, "during_save": bool(left)}


def trial(folder, number, recipe, steps, env, limit, whole) -> dict:
    """One kill, one resume, one comparison."""
    out = folder / f"killed-{number}"
    dice = random.Random(number)
    for _ in range(20):
        at = 0 if number == 0 else None if number % 3 == 1 else dice.randrange(steps)
        killed = run_until_killed(out, recipe, env, at, limit)
        if killed is not None:
            break
    else:
        raise RuntimeError("no kill came in time")
    text = finish(start(out, ["--resume"], env), limit)
    resumed = re.search(r"resumed .* at step (\d+)", text)
    same_rows, same_state = numbers(out) == whole[0], checksums(out) == whole[1]
    shutil.rmtree(out)
    return {
        "trial": number, **killed, "resumed_at": int(resumed.group(1)) if resumed else 0,
        "same_rows": same_rows, "same_state": same_state, "same": same_rows and same_state,
    }


def experiment(folder, kills=10, env=None, recipe=None, results=None, limit=600.0) -> dict:
    """Run the trials that ``results`` does not hold yet, and return all of them."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = RECIPE if recipe is None else recipe
    steps = int(recipe[recipe.index("--steps") + 1])
    env = {**os.environ, "PYTHONPATH": str(ROOT)} if env is None else env
    done = {"recipe": recipe, "trials": []}
    if results is not None and results.exists():
        stored = json.loads(results.read_text())
        done = stored if stored["recipe"] == recipe else done
    missing = [n for n in range(kills) if n not in [t["trial"] for t in done["trials"]]]
    if missing:
        out, started = folder / "whole", time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        finish(start(out, recipe, env), limit)
        done |= {
            "rows": len(rows(out)), "seconds": round(time.monotonic() - started, 1),
            "final": rows(out)[-1], "host": platform.platform(), "date": time.strftime("%Y-%m-%d"),
            "versions": json.loads(
                (out / "checkpoints" / str(steps) / "meta" / "metadata").read_text()
            )["versions"],
            "command": "python experiments/kill_resume.py",
        }
        whole = numbers(out), checksums(out)
    for number in missing:
        done["trials"].append(trial(folder, number, recipe, steps, env, limit, whole))
        if results is not None:
            partial = results.with_suffix(".part")
            partial.write_text(json.dumps(done, indent=1) + "\n")
            partial.replace(results)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="/tmp/attnlab-kills", help="folder of the runs")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    found = experiment(args.out, args.kills, results=args.results)
    print(f"{'trial':>5} {'last row':>8} {'in a save':>9} {'rows':>6} {'state':>6}  resumed at")
    for t in found["trials"]:
        print(
            f"{t['trial']:>5} {t['last_row']:>8} {t['during_save']!s:>9} {t['same_rows']!s:>6} "
            f"{t['same_state']!s:>6}  {t['resumed_at']}"
        )
    good = sum(t["same"] for t in found["trials"])
    print(f"{good} of {len(found['trials'])} equal to the run that nothing interrupted")
    return 0 if good == len(found["trials"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
