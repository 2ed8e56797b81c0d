"""README.md is run as its reader would run it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks_run_in_order():
    names: dict = {"__name__": "readme"}
    for source in blocks("python"):
        exec(compile(source, str(README), "exec"), names)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    parts = [p.split("#")[0].strip() for line in lines for p in line.split("&&")]
    return [p for p in parts if p.startswith("attnlab")]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    from attnlab.cli import COMMANDS
    from attnlab.commands.parsing import parse

    parse(shlex.split(command)[1:], COMMANDS)


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_the_first_command_trains_below_1_95_bits_per_byte(tmp_path):
    out = tmp_path / "quickstart"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # the suite's: one slow thread
    done = subprocess.run(
        [sys.executable, "-m", "attnlab", "train", "--out", str(out)],
        capture_output=True, text=True, timeout=1400, check=False, env=env,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_bits_per_byte"] < 1.95
    for name in ("config.json", "loss.png", "sample.txt", "checkpoints"):
        assert (out / name).exists()
    assert done.stdout.strip().splitlines()[-1].startswith("next: ")
