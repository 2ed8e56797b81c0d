"""The console script ``attnlab``: the table of commands, and what becomes of an error.

An error is one line on stderr; exit code 2 = the command line, config, data or mesh is wrong, 1 =
the run failed, 130 = interrupted.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from attnlab.commands import (
    bench,
    check,
    compare,
    convert,
    cost,
    explain,
    generate,
    listing,
    tokenize,
    train,
    tune,
)
from attnlab.commands import eval as evaluate
from attnlab.commands.parsing import WRONG, Command, parse
from attnlab.core.errors import AttnlabError, CheckpointError, NonFiniteError

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if not debug:  # orbax's notes to its developers
        logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_note, warnings.showwarning)
            args = parse(argv, COMMANDS)
            return args.run(args) or 0
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `attnlab list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AttnlabError as error:
        if debug:
            raise
        return _complain(str(error), error)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}"
        return _complain(f"{what} (unexpected: run it again with --debug and report it)", error)


def _note(others, message, *place, **more) -> None:
    """Our own warnings as a line for a person; those of libraries as they are."""
    ours, _, text = str(message).partition("attnlab: ")
    if text and not ours:
        print(f"note: {text}", file=sys.stderr)
    else:
        others(message, *place, **more)


def _complain(text: str, error: Exception) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    run_failed = isinstance(error, NonFiniteError | CheckpointError)
    return FAILED if run_failed or not isinstance(error, AttnlabError) else WRONG


COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train a model from a recipe: checkpoints, metrics, a loss plot and a sample.",
        "attnlab train quickstart --steps 200\n"
        "attnlab train 350m --data tokens/ --mesh fsdp=-1 --attention mla --out runs/mla\n"
        "attnlab train --resume --out runs/mla",
        train.parser, train.run,
    ),
    "eval": Command(
        "Measure the loss of a run on its validation split or on other text.",
        "attnlab eval runs/quickstart --json\nattnlab eval runs/quickstart --data book.txt",
        evaluate.parser, evaluate.run,
    ),
    "generate": Command(
        "Continue prompts with a trained run.",
        "attnlab generate runs/quickstart --prompt 'def ' --tokens 100 --top-k 40",
        generate.parser, generate.run,
    ),
    "tokenize": Command(
        "Train a tokenizer, or tokenise a corpus once so that runs start at once.",
        "attnlab tokenize --data text/ --train 32768 --out tokenizer.json\n"
        "attnlab tokenize --data text/ --tokenizer tokenizer.json --out tokens",
        tokenize.parser, tokenize.run,
    ),
    "bench": Command(
        "Time the training step or the attention op here; judge kernels without their device.",
        "attnlab bench train --recipe 350m --batch 8 --seq-len 4096\n"
        "attnlab bench attention --case causal-128,t5 --seconds 450 --out rows.json\n"
        "attnlab bench attention --target v5e --shape llama3-8b-8k --blocks all",
        bench.parser, bench.run,
    ),
    "tune": Command(
        "Choose the block sizes of attention kernels and keep them: predicted, or measured here.",
        "attnlab tune\nattnlab tune --target v5e --shape primary",
        tune.parser, tune.run,
    ),
    "compare": Command(
        "Train variants on generated tasks, alike in all else, and say which is better.",
        "attnlab compare --variants gqa,mla,cca --task mqar --seeds 3\n"
        "attnlab compare --variants gqa,sqa --task induction,selective-copying --out runs/compare",
        compare.parser, compare.run,
    ),
    "cost": Command(
        "Say what a layer of each variant costs on a device: time by roofline, FLOPs, bytes.",
        "attnlab cost\n"
        "attnlab cost --mode prefill --target v5p --variants gqa,mla --contexts 4k,32k\n"
        "attnlab cost --batch 64 --plot cost.png",
        cost.parser, cost.run,
    ),
    "convert": Command(
        "Write the parameters of a run to one file.",
        "attnlab convert runs/quickstart --to safetensors --out model.safetensors\n"
        "attnlab convert runs/quickstart --to npz --layout unstacked --out model.npz",
        convert.parser, convert.run,
    ),
    "explain": Command(
        "Say which implementation each variant would use here, and why the others would not run.",
        "attnlab explain\nattnlab explain mla --shape B=4,T=8192 --dtype bfloat16 --platform gpu",
        explain.parser, explain.run,
    ),
    "list": Command(
        "List the variants with paper, cache size and implementations; recipes; presets.",
        "attnlab list\nattnlab list --json",
        listing.parser, listing.run,
    ),
    "check": Command(
        "Check versions and devices and run a self-test of 20 seconds.",
        "attnlab check",
        check.parser, check.run,
    ),
}
