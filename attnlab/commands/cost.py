"""``attnlab cost``: see ``attnlab.analysis.cost``."""

from __future__ import annotations

from attnlab.commands.parsing import Args, Parser, digits, whole
from attnlab.core.errors import ConfigError


def parser(p: Parser) -> None:
    from attnlab.analysis.targets import DEVICES

    add = p.add_argument
    add("--variants", metavar="NAMES", help="comma-separated (default: all)")
    add("--target", default="h200", metavar="NAME", help=f"{', '.join(DEVICES)} (default: h200)")
    add("--mode", choices=("train", "prefill", "decode", "mix"), default="decode",
        help="default: decode; mix: 176 tokens read for each one answered")
    add("--contexts", metavar="LENGTHS", help="comma-separated, 4k is 4096 (default: 1k to 128k)")
    add("--batch", type=whole, default=1, help="rows (default: 1)")
    add("--json", action="store_true", help="print JSON: FLOPs, bytes, intensity, bound, seconds")
    add("--plot", metavar="FILE", help="draw time against context length")


def run(args: Args) -> int:
    args.contexts = args.contexts and lengths(args.contexts)
    from attnlab.analysis import cost

    return cost.main(args)


def lengths(text: str) -> list[int]:
    """``"1k,32k"`` as numbers of tokens."""
    found = []
    for part in text.split(","):
        number, unit = (part[:-1], 1024) if part[-1:] in ("k", "K") else (part, 1)
        if not digits(number) or int(number) < 1:
            rule = f"{part!r} is no number of tokens"
            raise ConfigError(f"--contexts {text}", rule, "use 1k,32k")
        found.append(int(number) * unit)
    return sorted(set(found))
