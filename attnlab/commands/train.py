"""``attnlab train``: flags that are shorthands for ``--set``."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from attnlab.commands.parsing import Args, Parser, span, whole
from attnlab.core.errors import ConfigError


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
    return Short(flag, (field, *more), text, {"type": whole, "metavar": "N"})


def _absolute(path: str) -> str:
    """The recipe outlives the folder the command was given in."""
    return path if "://" in path else os.path.abspath(path)


_PATHS = {"nargs": "+", "metavar": "PATH"}
SHORTS: dict[str, tuple[Short, ...]] = {
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
    "start": (
        Short("--init-from", ("train.init_from",), "start from the weights of another run",
              {"metavar": "RUN", "type": _absolute}),
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


def parser(p: Parser) -> None:
    p.add_argument(
        "recipe", nargs="?", metavar="RECIPE",
        help="a name from `attnlab list` or the config.json of a run (default: quickstart)",
    )
    model = p.add_argument_group("model")
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
    for title, shorts in SHORTS.items():
        group = p.add_argument_group(title)
        for short in shorts:
            short.add(group)
    _run_folder_arguments(p)


def _run_folder_arguments(parser: Parser) -> None:
    folder = parser.add_argument_group("run folder")
    folder.add_argument("--out", metavar="DIR", help="run folder (default: runs/RECIPE)")
    start = folder.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, under its own recipe; "
        "with RECIPE that must be the recipe, and is started where no run is yet",
    )
    start.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    watch = parser.add_argument_group("watching")
    watch.add_argument("--profile", type=span, metavar="START:STOP", help="steps to trace")
    watch.add_argument("--tb", action="store_true", help="log to TensorBoard (attnlab[tb])")
    watch.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases (attnlab[wandb])"
    )
    watch.add_argument("--plain", action="store_true", help="no progress bar")


def overrides(args: Args) -> list[str]:
    """The assignments that the flags stand for, ``--set`` last."""
    found = []
    for short in (short for shorts in SHORTS.values() for short in shorts):
        value = getattr(args, short.dest)
        if value is not None:
            found += [f"{field}={value!r}" for field in short.fields]
    return found + args.sets


def run(args: Args) -> int:
    if args.resume and not args.recipe and args.attention:
        raise ConfigError(
            "--resume with --attention", "a run goes on as it was started",
            "drop --attention, name the RECIPE too, or start another run with --out",
        )
    from attnlab.train import recipe as recipes

    own = args.resume and not args.recipe  # go on under the recipe in the run folder
    recipe = None if own else recipes.load(args.recipe or "quickstart")
    if recipe is not None and args.attention:
        recipe = _swap_attention(recipe, args.attention)
    if "help" in args.sets:
        return _show_fields(recipe or recipes.load(os.path.join(_out(args), "config.json")))
    from attnlab.train import loop

    wanted = tuple(name for name in ("tb", "wandb") if getattr(args, name))
    return loop.run(
        recipe, _out(args), overrides(args), resume=args.resume, overwrite=args.overwrite,
        profile=args.profile, trackers_wanted=wanted, plain=args.plain,
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
    # Another architecture cannot take the weights that the old one started from.
    own = dataclasses.replace(recipe.train, init_from=None)
    return dataclasses.replace(recipe, model=model, train=own)


def _show_fields(recipe) -> int:
    from attnlab.core.config import flat, to_dict

    for name, value in sorted(flat(to_dict(recipe)).items()):
        print(f"{name} = {value!r}")
    return 0
