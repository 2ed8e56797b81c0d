"""Parsing for the console script: argparse whose complaints are ConfigErrors."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Mapping

from attnlab.core.errors import ConfigError

Parser = argparse.ArgumentParser
Args = argparse.Namespace
WRONG = 2  # exit code: the command line, config, data or mesh is wrong


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


def parse(argv: list[str], table: Mapping[str, Command]) -> Args:
    """The arguments of a command line of ``table``; ``run`` in them is the function to call."""
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
    for title, command in table.items():
        _add(commands, title, command, complete=title == name)
    if not argv:
        top.print_help()
        raise SystemExit(WRONG)
    if not name.startswith("-") and name not in table:
        near = difflib.get_close_matches(name, table) or list(table)
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


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def digits(text: str) -> bool:
    """Only 0 to 9: ``str.isdigit`` also takes what ``int`` refuses."""
    return text.isascii() and text.isdecimal()


def span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (digits(first) and digits(last) and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP with 1 <= START <= STOP")
    return int(first), int(last)


def run_argument(parser: Parser) -> None:
    """The run folder that a command reads, and its checkpoint."""
    parser.add_argument("folder", metavar="RUN", help="run folder written by `attnlab train`")
    parser.add_argument("--step", type=whole, metavar="N", help="checkpoint (default: the newest)")
