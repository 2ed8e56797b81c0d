"""``attnlab explain``."""

from __future__ import annotations

import dataclasses
import json

from attnlab.analysis.printing import table
from attnlab.commands.parsing import Args, Parser, digits, whole
from attnlab.core.errors import ConfigError


def parser(p: Parser) -> None:
    p.add_argument("variant", nargs="?", metavar="VARIANT", help="default: all of them")
    what = p.add_argument_group("the call")
    what.add_argument(
        "--shape", metavar="LETTER=N,...",
        help="B rows, T tokens, D width, N heads, K key/value heads, H head width "
        "(B=1,T=4096,D=2048,N=16,K=4,H=128)",
    )
    what.add_argument("--batch", type=whole, metavar="N", help="short for --shape B=N")
    what.add_argument("--tokens", type=whole, metavar="N", help="short for --shape T=N")
    what.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: both")
    what.add_argument(
        "--layout", choices=("packed", "full"), default="packed",
        help="training rows: packed documents, or one document each (packed)",
    )
    what.add_argument("--recipe", metavar="NAME", help="the layers and sizes of this recipe")
    where = p.add_argument_group("the device")
    where.add_argument(
        "--platform", choices=("cpu", "gpu", "tpu"), help="what would happen there (default: here)"
    )
    where.add_argument("--kind", metavar="NAME", help='device kind, as "NVIDIA H100 80GB HBM3"')
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Args) -> int:
    from attnlab.analysis import explain

    if args.variant and args.recipe:
        raise ConfigError(
            f"{args.variant} with --recipe {args.recipe}", "the recipe names its own layers",
            "drop one of them, or give the sizes of the variant with --shape",
        )
    on = explain.device(args.platform, args.kind)
    letters = parse_shape(args.shape)
    for letter, value in (("B", args.batch), ("T", args.tokens)):
        letters |= {} if value is None else {letter: value}
    layers, letters = _layers(args, letters)
    rows = explain.explain(
        layers, batch=letters.get("B", 1), tokens=letters.get("T", 4096), layout=args.layout, on=on
    )
    if args.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return 0
    print(f"on {on.platform} ({on.kind}), B = {letters.get('B', 1)}, T = {letters.get('T', 4096)}")
    table(
        ("variant", "pass", "dtype", "op", "runs on", "the others"),
        [
            (r.layer, r.mode, ", ".join(r.dtypes), r.op, r.chosen,
             "\n".join(f"{name}: {why}" for name, why in r.others))
            for r in rows
        ],
    )
    return 0


def _layers(args: Args, letters: dict[str, int]):
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
        if letter not in tuple("BTDNKH") or not digits(value) or int(value) < 1:
            raise ConfigError(
                f"--shape {item}", "is not LETTER=NUMBER with one of B, T, D, N, K, H",
                "write --shape B=1,T=4096,D=2048,N=16,K=4,H=128",
            )
        sizes[letter] = int(value)
    return sizes
