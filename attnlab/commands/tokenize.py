"""``attnlab tokenize``."""

from __future__ import annotations

import shlex

from attnlab.commands.parsing import Args, Parser, whole


def parser(p: Parser) -> None:
    data = p.add_argument_group("corpus")
    data.add_argument("--data", nargs="+", default=["stdlib"], metavar="PATH", help="(stdlib)")
    data.add_argument("--val-data", nargs="+", default=[], metavar="PATH", help="held-out files")
    data.add_argument("--text-field", default="text", metavar="NAME", help="of JSON lines (text)")
    what = p.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    what.add_argument("--train", type=whole, metavar="VOCAB", help="train a BPE of this many ids")
    what.add_argument("--tokenizer", metavar="PATH", help="tokenise with bytes or this JSON file")
    p.add_argument(
        "--out", required=True, metavar="PATH", help="file with --train, folder with --tokenizer"
    )
    p.add_argument("--overwrite", action="store_true", help="replace what is there")


def run(args: Args) -> int:
    from attnlab.data import tokenizer as tokenizers
    from attnlab.data.corpus import load_corpus

    corpus = load_corpus(args.data, val_data=args.val_data, text_field=args.text_field)
    print(corpus.description)
    if args.train is not None:
        made = tokenizers.train_tokenizer(corpus, args.train, args.out, overwrite=args.overwrite)
        print(f"{args.out}: {made.vocab_size} ids, fingerprint {made.fingerprint}")
        data = " ".join(shlex.quote(path) for path in args.data)
        print(f"next: attnlab tokenize --data {data} --tokenizer {args.out} --out tokens")
        return 0
    loaded = tokenizers.load_tokenizer(args.tokenizer)
    meta = tokenizers.tokenize_corpus(corpus, loaded, args.out, overwrite=args.overwrite)
    counts = ", ".join(f"{f['tokens']:,} {f['split']}" for f in meta["files"].values())
    print(f"{args.out}: {counts} tokens as {meta['dtype']}")
    print(
        f"next: attnlab train --data {shlex.quote(args.out)} --tokenizer "
        f"{shlex.quote(args.tokenizer)} --set model.vocab_size={loaded.vocab_size}"
    )
    return 0
