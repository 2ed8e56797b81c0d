"""The console script ``attnlab``: argparse on config dataclasses, a pair of functions a command.

``_x_arguments`` describes the flags of command x and imports nothing heavy, ``_x`` runs it. An
error is one line on stderr; exit code 2 = the command line, config, data or mesh is wrong, 1 = the
run failed, 130 = interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attnlab.core.errors import AttnlabError, CheckpointError, ConfigError, NonFiniteError

Parser = argparse.ArgumentParser
Args = argparse.Namespace
FAILED, WRONG, INTERRUPTED = 1, 2, 130
PLAIN_WIDTH = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = parse(argv)
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


def _complain(text: str, error: Exception) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    run_failed = isinstance(error, NonFiniteError | CheckpointError)
    return FAILED if run_failed or not isinstance(error, AttnlabError) else WRONG


# Parsing.


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: one sentence, an example, its flags and its function."""

    summary: str
    example: str
    arguments: Callable[[Parser], None]
    run: Callable[[Args], int | None]


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors: one line, with the way out."""

    def error(self, message: str):
        raise ConfigError(self.prog, message, f"see `{self.prog} --help`")


def parse(argv: list[str]) -> Args:
    """The arguments of a command line; ``run`` in them is the function to call."""
    top = _Parser(
        "attnlab", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="The attention laboratory for JAX.",
        epilog="example:\n  attnlab check\n  attnlab train quickstart\n\n"
        "Every command has its own --help.",
    )
    name = argv[0] if argv else ""
    version = _version() if name == "--version" else ""
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(metavar="COMMAND", title="commands")
    for title, command in COMMANDS.items():
        _add(commands, title, command, complete=title == name)
    if not argv:
        top.print_help()
        raise SystemExit(WRONG)
    if not name.startswith("-") and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS) or list(COMMANDS)
        raise ConfigError(f"attnlab {name}", "is not a command", f"use {' or '.join(near)}")
    args, unknown = top.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], commands.choices.get(name, top))
    if not hasattr(args, "run"):
        raise ConfigError(f"attnlab {name}", "names no command", "see `attnlab --help`")
    return args


def _add(commands, title: str, command: Command, complete: bool) -> None:
    """The parser of one command; its flags only if it is the one that runs."""
    parser = commands.add_parser(
        title, help=command.summary, description=command.summary, allow_abbrev=False,
        epilog="example:\n" + "\n".join(f"  {line}" for line in command.example.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if complete:
        command.arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show tracebacks")
        parser.set_defaults(run=command.run)


def _refuse(word: str, parser: Parser):
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        parser.error(f"unexpected argument {word!r}")
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
    fix = f"use {near[0]}" if near else f"see `{parser.prog} --help`"
    raise ConfigError(flag, f"is not a flag of {parser.prog}", fix)


def _version() -> str:
    import attnlab

    return f"attnlab {attnlab.__version__}"


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP with 1 <= START <= STOP")
    return int(first), int(last)


# Printing.


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A rich table on a terminal, aligned text elsewhere; long cells wrap, nothing is cut off."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    rows = [[str(cell) for cell in row] for row in rows]
    for i, title in enumerate(columns):
        words = [word for row in [columns, *rows] for word in row[i].split()]
        longest = max(map(len, words), default=1)
        table.add_column(title, overflow="fold", min_width=min(longest, 20))
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if terminal else PLAIN_WIDTH, highlight=False)
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


# train


@dataclasses.dataclass(frozen=True)
class Short:
    """A flag that is a shorthand for ``--set field=value``."""

    flag: str
    fields: tuple[str, ...]
    help: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dest(self) -> str:
        return self.flag[2:].replace("-", "_")

    def add(self, group) -> None:
        text = f"{self.help} ({', '.join(self.fields)})"
        group.add_argument(self.flag, dest=self.dest, help=text, **self.options)


def _count(flag: str, field: str, text: str, *more: str) -> Short:
    return Short(flag, (field, *more), text, {"type": _whole, "metavar": "N"})


_PATHS = {"nargs": "+", "metavar": "PATH"}
_SHORTS: dict[str, tuple[Short, ...]] = {
    "data": (
        Short("--data", ("data.data",), "files, folders, globs, stdlib, stdlib+packages", _PATHS),
        Short("--val-data", ("data.val_data",), "held-out files instead of a split", _PATHS),
        Short("--tokenizer", ("data.tokenizer",), "bytes, or a tokenizers JSON file",
              {"metavar": "PATH"}),
        Short("--text-field", ("data.text_field",), "JSON field that holds the text",
              {"metavar": "NAME"}),
        Short("--token-dtype", ("data.token_dtype",), "integer dtype of .bin files",
              {"metavar": "DTYPE"}),
        Short("--packing", ("data.packing",), "cut one stream, or fit whole documents",
              {"choices": ("concat", "fit")}),
    ),
    "size of the run": (
        _count("--steps", "train.steps", "optimizer steps"),
        _count("--batch", "train.batch", "rows a step over all devices"),
        _count("--seq-len", "train.seq_len", "tokens a row"),
        _count("--accumulate", "train.accumulate", "microbatches a step"),
        _count("--seed", "train.seed", "of initialisation and data order", "data.seed"),
    ),
    "hardware": (
        Short("--mesh", ("train.mesh",), "such as data=2,fsdp=2,tensor=2; -1 takes the rest",
              {"metavar": "AXES"}),
        Short("--impl", ("train.impl",), "attention implementation, see `attnlab explain`",
              {"metavar": "NAME"}),
    ),
    "cadence": (
        _count("--log-every", "train.log_every", "steps between logged steps"),
        _count("--eval-every", "train.eval_every", "steps between evaluations, 0 = at the end"),
        _count("--checkpoint-every", "train.checkpoint_every",
               "steps between checkpoints, 0 = at the end"),
    ),
}


def _train_arguments(parser: Parser) -> None:
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE",
        help="a name from `attnlab list` or the config.json of a run (default: quickstart)",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--attention", metavar="VARIANT",
        help="swap the attention: dim, heads and head width stay where the variant has them, its "
        "other widths follow its paper; RoPE base, window, sinks and precision are carried over",
    )
    model.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="sets",
        help="change any field of the recipe, as in --set model.period.0.window=512; repeatable, "
        "wins over the flags below; --set help lists every field with its value",
    )
    for title, shorts in _SHORTS.items():
        group = parser.add_argument_group(title)
        for short in shorts:
            short.add(group)
    _run_folder_arguments(parser)


def _run_folder_arguments(parser: Parser) -> None:
    folder = parser.add_argument_group("run folder")
    folder.add_argument("--out", metavar="DIR", help="run folder (default: runs/RECIPE)")
    start = folder.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, under its own recipe"
    )
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    folder.add_argument("--init-from", metavar="RUN", help="start from the weights of another run")
    watch = parser.add_argument_group("watching")
    watch.add_argument("--profile", type=_span, metavar="START:STOP", help="steps to trace")
    watch.add_argument("--tb", action="store_true", help="log to TensorBoard (attnlab[tb])")
    watch.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases (attnlab[wandb])"
    )
    watch.add_argument("--plain", action="store_true", help="no progress bar")


def overrides(args: Args) -> list[str]:
    """The assignments that the flags stand for, ``--set`` last."""
    found = []
    for short in (short for shorts in _SHORTS.values() for short in shorts):
        value = getattr(args, short.dest)
        if value is not None:
            found += [f"{field}={value!r}" for field in short.fields]
    return found + args.sets


def _train(args: Args) -> int:
    for flag in ("attention", "init_from"):
        if args.resume and getattr(args, flag):
            name = flag.replace("_", "-")
            raise ConfigError(
                f"--resume with --{name}", "a run goes on as it was started",
                f"drop --{name}, or start another run with --out",
            )
    from attnlab.train import recipe as recipes

    name = args.recipe or "quickstart"
    recipe = None if args.resume else recipes.load(name)
    if recipe is not None and args.attention:
        recipe = _swap_attention(recipe, args.attention)
    if "help" in args.sets:
        return _show_fields(recipe or recipes.load(os.path.join(_out(args), "config.json")))
    from attnlab.train import loop

    wanted = tuple(name for name in ("tb", "wandb") if getattr(args, name))
    return loop.run(
        recipe, _out(args), overrides(args), resume=args.resume, overwrite=args.overwrite,
        init_from=args.init_from, profile=args.profile, trackers_wanted=wanted, plain=args.plain,
    )


def _out(args: Args) -> str:
    """``runs/RECIPE``, or the folder of the RECIPE file, or ``runs/RECIPE-VARIANT``."""
    if args.out:
        return args.out
    name = args.recipe or "quickstart"
    if name.endswith(".json"):
        raise ConfigError(
            "--out", f"is needed for a run from {name}, which does not name a folder",
            "add --out DIR",
        )
    return os.path.join("runs", f"{name}-{args.attention}" if args.attention else name)


def _swap_attention(recipe, variant: str):
    from attnlab.analysis.listing import swap

    period = tuple(swap(layer, variant) for layer in recipe.model.period)
    model = dataclasses.replace(recipe.model, period=period)
    return dataclasses.replace(recipe, model=model)


def _show_fields(recipe) -> int:
    from attnlab.core.config import to_dict

    for name, value in sorted(_flat(to_dict(recipe)).items()):
        print(f"{name} = {value!r}")
    return 0


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; a list of plain values is a leaf."""
    if isinstance(value, dict):
        items: Iterable = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {path: value}
    out: dict[str, Any] = {}
    for key, item in items:
        out |= _flat(item, f"{path}.{key}" if path else str(key))
    return out


# eval


def _run_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder written by `attnlab train`")
    parser.add_argument("--step", type=_whole, metavar="N", help="checkpoint (default: the newest)")


def _eval_arguments(parser: Parser) -> None:
    _run_arguments(parser)
    what = parser.add_argument_group("what to evaluate on").add_mutually_exclusive_group()
    what.add_argument(
        "--split", choices=("validation", "train"), default="validation",
        help="of the run's own corpus (default: validation)",
    )
    what.add_argument(
        "--data", "--val-data", nargs="+", metavar="PATH", dest="data",
        help="other files, folders or globs, all of them",
    )
    parser.add_argument("--batch", type=_whole, metavar="N", help="rows a batch (as in the run)")
    parser.add_argument("--json", action="store_true", help="also print one line of JSON")


def _eval(args: Args) -> int:
    from attnlab.infer.evaluate import evaluate
    from attnlab.parallel.feed import batch_shard
    from attnlab.train.data import eval_batches
    from attnlab.train.restore import load_run

    run = load_run(args.folder, step=args.step)
    rows = _eval_rows(args, run)
    batch = args.batch or run.recipe.train.batch
    shape = (batch, run.recipe.train.seq_len)
    index, count = batch_shard(run.trainer.batch_sharding, shape)
    batches = eval_batches(rows, batch, shard_index=index, shard_count=count)
    found = evaluate(run.trainer, run.params, batches, bytes_per_token=rows.bytes_per_token)
    row = {
        "run": args.folder, "step": int(run.step), "on": args.data or args.split,
        "nats_per_token": found.nats_per_token, "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
    }
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    _table(
        ("step", "nats/token", "bits/byte", "tokens"),
        [(row["step"], f"{found.nats_per_token:.4f}", bits, f"{found.tokens:,}")],
    )
    if args.json:
        print(json.dumps(row))
    return 0


def _eval_rows(args: Args, run):
    from attnlab.data.corpus import load_corpus
    from attnlab.train.data import build_rows
    from attnlab.train.setup import read_data

    data, train = run.recipe.data, run.recipe.train
    if args.data:
        corpus = load_corpus(
            args.data, text_field=data.text_field, token_dtype=data.token_dtype, val_fraction=0
        )
        return build_rows(
            corpus.train, run.tokenizer, train.seq_len, packing=data.packing,
            document_mask=data.document_mask,
        )
    _, on_train, on_val, fingerprint, _ = read_data(run.recipe)
    if fingerprint != run.corpus_fingerprint:
        print(
            f"note: this corpus ({fingerprint}) is not the one of the run "
            f"({run.corpus_fingerprint}); the split may differ", file=sys.stderr,
        )
    return on_val if args.split == "validation" else on_train


# generate


def _generate_arguments(parser: Parser) -> None:
    _run_arguments(parser)
    prompts = parser.add_argument_group("prompts").add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    prompts.add_argument("--prompt-file", metavar="FILE", help="one prompt, the whole file")
    parser.add_argument("--tokens", type=_whole, default=200, metavar="N", help="at most (200)")
    how = parser.add_argument_group("sampling")
    how.add_argument("--temperature", type=_number, default=0.8, metavar="X", help="(0.8)")
    how.add_argument("--top-k", type=_whole, metavar="N", help="keep the N likeliest tokens")
    how.add_argument("--top-p", type=_number, metavar="X", help="keep this much probability")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    how.add_argument("--seed", type=_whole, default=0, metavar="N", help="of the draws (0)")
    how.add_argument(
        "--stop", action="append", default=[], metavar="TEXT|ID",
        help="end before this text, or before the token id if it is a number; repeatable (the end "
        "of a document always ends)",
    )


def _generate(args: Args) -> int:
    import jax

    from attnlab.infer.generate import generate
    from attnlab.infer.sample import SampleConfig
    from attnlab.train.restore import load_run

    sample = SampleConfig(
        temperature=0.0 if args.greedy else args.temperature, top_k=args.top_k, top_p=args.top_p
    )
    texts = _prompts(args)
    run = load_run(args.folder, step=args.step)
    tokenizer, trainer = run.tokenizer, run.trainer
    ids = [[tokenizer.bos, *tokenizer.encode(text.encode()).tolist()] for text in texts]
    stop_ids = [int(word) for word in args.stop if word.isdigit()]
    out = generate(
        (trainer.graphdef, jax.device_put(run.params, trainer.replicated)), ids,
        new_tokens=args.tokens, sample=sample, key=jax.random.key(args.seed),
        stop_ids=sorted({tokenizer.bos, *stop_ids}),
    )
    words = [word for word in args.stop if not word.isdigit()]
    for i, (text, new) in enumerate(zip(texts, out.tokens, strict=True)):
        if len(texts) > 1:
            print(f"--- prompt {i + 1}")
        print(text + cut(tokenizer.decode(new), words))
    return 0


def _prompts(args: Args) -> list[str]:
    if args.prompt_file is None:
        return args.prompt
    try:
        with open(args.prompt_file, encoding="utf-8") as file:
            return [file.read()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompt-file {args.prompt_file}", f"cannot be read ({error})", "check the path"
        ) from None


def cut(text: str, words: Sequence[str]) -> str:
    """``text`` up to the first of ``words``."""
    return text[: min((at for word in words if (at := text.find(word)) >= 0), default=len(text))]


# tokenize


def _tokenize_arguments(parser: Parser) -> None:
    data = parser.add_argument_group("corpus")
    data.add_argument("--data", nargs="+", default=["stdlib"], metavar="PATH", help="(stdlib)")
    data.add_argument("--val-data", nargs="+", default=[], metavar="PATH", help="held-out files")
    data.add_argument("--text-field", default="text", metavar="NAME", help="of JSON lines (text)")
    what = parser.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    what.add_argument("--train", type=_whole, metavar="VOCAB", help="train a BPE of this many ids")
    what.add_argument("--tokenizer", metavar="PATH", help="tokenise with bytes or this JSON file")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="file with --train, folder with --tokenizer"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _tokenize(args: Args) -> int:
    from attnlab.data import tokenizer as tokenizers
    from attnlab.data.corpus import load_corpus

    corpus = load_corpus(args.data, val_data=args.val_data, text_field=args.text_field)
    print(corpus.description)
    if args.train is not None:
        made = tokenizers.train_tokenizer(corpus, args.train, args.out, overwrite=args.overwrite)
        print(f"{args.out}: {made.vocab_size} ids, fingerprint {made.fingerprint}")
        print(f"next: attnlab tokenize --tokenizer {args.out} --out tokens")
        return 0
    loaded = tokenizers.load_tokenizer(args.tokenizer)
    meta = tokenizers.tokenize_corpus(corpus, loaded, args.out, overwrite=args.overwrite)
    counts = ", ".join(f"{f['tokens']:,} {f['split']}" for f in meta["files"].values())
    print(f"{args.out}: {counts} tokens as {meta['dtype']}")
    print(f"next: attnlab train --data {args.out} --tokenizer {args.tokenizer}")
    return 0


# bench


def _bench_arguments(parser: Parser) -> None:
    from attnlab.analysis import bench

    bench.add_arguments(parser)


def _bench(args: Args) -> int:
    from attnlab.analysis import bench

    return bench.main(args)


# convert


def _convert_arguments(parser: Parser) -> None:
    _run_arguments(parser)
    parser.add_argument("--to", choices=("npz", "safetensors"), required=True, help="file format")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--layout", choices=("stacked", "unstacked"), default="stacked",
        help="layers on a leading axis as in training, or one entry a layer (default: stacked)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def _convert(args: Args) -> int:
    if os.path.exists(args.out) and not args.overwrite:
        raise ConfigError(f"--out {args.out}", "exists", "pass --overwrite or another file")
    write = {"npz": _write_npz, "safetensors": _write_safetensors}[args.to]
    from attnlab.train.restore import load_run

    run = load_run(args.folder, step=args.step)
    arrays = named_arrays(run.params, args.layout)
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    write(arrays, args.out, {"attnlab_recipe": run.recipe.to_json(), "step": str(int(run.step))})
    size = sum(a.nbytes for a in arrays.values())
    print(f"{args.out}: {len(arrays)} arrays, {size / 1e6:.1f} MB, step {int(run.step)}")
    return 0


def named_arrays(params: Any, layout: str = "stacked") -> dict[str, Any]:
    """Host arrays by dotted name, as ``blocks.0.attn.w_q``."""
    import jax
    import numpy as np

    if layout == "unstacked":
        from attnlab.convert import restack

        params = restack.unstack(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): np.asarray(leaf)
        for path, leaf in leaves
    }


def _write_npz(arrays: dict[str, Any], out: str, meta: dict[str, str]) -> None:
    import numpy as np

    odd = sorted({a.dtype.name for a in arrays.values() if a.dtype.kind == "V"})
    if odd:
        raise ConfigError(f"--to npz with {odd[0]} parameters", "NumPy files have no such dtype",
                          "use --to safetensors")
    with open(out, "wb") as file:
        np.savez(file, **arrays, **{f"__{k}__": np.asarray(v) for k, v in meta.items()})


def _write_safetensors(arrays: dict[str, Any], out: str, meta: dict[str, str]) -> None:
    from attnlab.core.errors import DataError

    try:
        from safetensors.flax import save_file
    except ImportError:
        raise DataError(
            "--to safetensors", "needs the safetensors package", 'pip install "attnlab[hf]"'
        ) from None
    save_file(arrays, out, metadata=meta)


# explain


def _explain_arguments(parser: Parser) -> None:
    parser.add_argument("variant", nargs="?", metavar="VARIANT", help="default: all of them")
    what = parser.add_argument_group("the call")
    what.add_argument(
        "--shape", metavar="LETTER=N,...",
        help="B rows, T tokens, D width, N heads, K key/value heads, H head width "
        "(B=1,T=4096,D=2048,N=16,K=4,H=128)",
    )
    what.add_argument("--batch", type=_whole, metavar="N", help="short for --shape B=N")
    what.add_argument("--tokens", type=_whole, metavar="N", help="short for --shape T=N")
    what.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: both")
    what.add_argument(
        "--layout", choices=("packed", "full"), default="packed",
        help="training rows: packed documents, or one document each (packed)",
    )
    what.add_argument("--recipe", metavar="NAME", help="the layers and sizes of this recipe")
    where = parser.add_argument_group("the device")
    where.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="what would happen there (default: here)"
    )
    where.add_argument("--kind", metavar="NAME", help='device kind, as "NVIDIA H100 80GB HBM3"')
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _explain(args: Args) -> int:
    from attnlab.analysis import explain

    on = explain.device(args.platform, args.kind)
    letters = parse_shape(args.shape)
    for letter, value in (("B", args.batch), ("T", args.tokens)):
        letters |= {} if value is None else {letter: value}
    layers, letters = _explain_layers(args, letters)
    rows = explain.explain(
        layers, batch=letters.get("B", 1), tokens=letters.get("T", 4096), layout=args.layout, on=on
    )
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return 0
    print(f"on {on.platform} ({on.kind}), B = {letters.get('B', 1)}, T = {letters.get('T', 4096)}")
    _table(
        ("variant", "pass", "dtype", "op", "runs on", "the others"),
        [
            (r.layer, r.mode, ", ".join(r.dtypes), r.op, r.chosen,
             "\n".join(f"{name}: {why}" for name, why in r.others))
            for r in rows
        ],
    )
    return 0


def _explain_layers(args: Args, letters: dict[str, int]):
    """``([(label, config)], letters)`` of the question."""
    from attnlab.analysis.listing import Shape, sized
    from attnlab.core import registry
    from attnlab.core.types import Precision

    if args.recipe:
        from attnlab.train import recipe as recipes

        recipe = recipes.load(args.recipe)
        size = {"B": recipe.train.batch // recipe.train.accumulate, "T": recipe.train.seq_len}
        layers = [
            (f"{registry.name_of(type(layer))} (period.{i})", layer)
            for i, layer in enumerate(recipe.model.period)
        ]
        return layers, size | letters
    names = [registry.get(args.variant).name] if args.variant else list(registry.VARIANTS)
    fields = {"D": "dim", "N": "num_heads", "K": "num_kv_heads", "H": "head_dim"}
    shape = Shape(**{fields[k]: v for k, v in letters.items() if k in fields})
    dtypes = (args.dtype,) if args.dtype else ("bfloat16", "float32")
    layers = [
        (name, sized(name, shape, precision=Precision.named(dtype)))
        for name in names for dtype in dtypes
    ]
    return layers, letters


def parse_shape(text: str | None) -> dict[str, int]:
    """``"B=1,T=4096"`` to a dict; letters of the legend."""
    sizes: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in (text or "").split(","))):
        letter, _, value = item.partition("=")
        if letter not in tuple("BTDNKH") or not value.isdigit() or int(value) < 1:
            raise ConfigError(
                f"--shape {item}", "is not LETTER=NUMBER with one of B, T, D, N, K, H",
                "write --shape B=1,T=4096,D=2048,N=16,K=4,H=128",
            )
        sizes[letter] = int(value)
    return sizes


# list


def _list_arguments(parser: Parser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument("--readme", action="store_true", help="print the variant table of the README")


def _list(args: Args) -> int:
    from attnlab.analysis import listing

    if args.readme:
        print(listing.variant_table(), end="")
        return 0
    rows = listing.rows()
    if args.json:
        everything = {"variants": rows, "recipes": _recipes(), "presets": _presets()}
        print(json.dumps(everything, indent=1))
        return 0
    _table(
        ("variant", "what it is", "paper", "cache B/token", "supports", "implementations"),
        [
            (r["name"], r["summary"], r["paper"], r["cache_bytes_per_token_bf16"],
             " ".join(r["supports"]), listing.backends(r))
            for r in rows
        ],
    )
    print(f"cache: bytes a token of one layer in bf16 at {listing.Shape()}\n")
    _table(
        ("recipe", "parameters", "attention", "steps", "batch", "seq_len"),
        [tuple(_shown(value) for value in r.values()) for r in _recipes()],
    )
    print()
    _table(
        ("preset", "parameters", "attention", "layers", "dim"),
        [tuple(_shown(value) for value in r.values()) for r in _presets()],
    )
    return 0


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _attention(model) -> str:
    from attnlab.core.registry import name_of

    return ", ".join(name_of(type(layer)) for layer in model.period)


def _recipes() -> list[dict[str, Any]]:
    from attnlab.train.recipe import RECIPES

    return [
        {"name": name, "parameters": r.model.param_count(), "attention": _attention(r.model),
         "steps": r.train.steps, "batch": r.train.batch, "seq_len": r.train.seq_len}
        for name, r in ((name, make()) for name, make in RECIPES.items())
    ]


def _presets() -> list[dict[str, Any]]:
    from attnlab.models.presets import PRESETS

    return [
        {"name": name, "parameters": m.param_count(), "attention": _attention(m),
         "layers": m.layers, "dim": m.dim}
        for name, m in ((name, make()) for name, make in PRESETS.items())
    ]


# check


def _check_arguments(parser: Parser) -> None:
    pass


def _check(args: Args) -> int:
    from attnlab.analysis import check

    return check.main(debug=args.debug)


COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train a model from a recipe: checkpoints, metrics, a loss plot and a sample.",
        "attnlab train quickstart --steps 200\n"
        "attnlab train 350m --data tokens/ --mesh fsdp=-1 --attention mla --out runs/mla\n"
        "attnlab train --resume --out runs/mla",
        _train_arguments, _train,
    ),
    "eval": Command(
        "Measure the loss of a run on its validation split or on other text.",
        "attnlab eval runs/quickstart --json\nattnlab eval runs/quickstart --data book.txt",
        _eval_arguments, _eval,
    ),
    "generate": Command(
        "Continue prompts with a trained run.",
        "attnlab generate runs/quickstart --prompt 'def ' --tokens 100 --top-k 40",
        _generate_arguments, _generate,
    ),
    "tokenize": Command(
        "Train a tokenizer, or tokenise a corpus once so that runs start at once.",
        "attnlab tokenize --data text/ --train 32768 --out tokenizer.json\n"
        "attnlab tokenize --data text/ --tokenizer tokenizer.json --out tokens",
        _tokenize_arguments, _tokenize,
    ),
    "bench": Command(
        "Time the training step of a recipe on this machine.",
        "attnlab bench train --recipe 350m --batch 8 --seq-len 4096",
        _bench_arguments, _bench,
    ),
    "convert": Command(
        "Write the parameters of a run to one file.",
        "attnlab convert runs/quickstart --to safetensors --out model.safetensors\n"
        "attnlab convert runs/quickstart --to npz --layout unstacked --out model.npz",
        _convert_arguments, _convert,
    ),
    "explain": Command(
        "Say which implementation each variant would use here, and why the others would not run.",
        "attnlab explain\nattnlab explain mla --shape B=4,T=8192 --dtype bfloat16 --platform gpu",
        _explain_arguments, _explain,
    ),
    "list": Command(
        "List the variants with paper, cache size and implementations; recipes; presets.",
        "attnlab list\nattnlab list --json",
        _list_arguments, _list,
    ),
    "check": Command(
        "Check versions and devices and run a self-test of 20 seconds.",
        "attnlab check",
        _check_arguments, _check,
    ),
}
