"""``attnlab generate``."""

from __future__ import annotations

from collections.abc import Sequence

from attnlab.commands.parsing import Args, Parser, digits, number, run_argument, whole
from attnlab.core.errors import ConfigError


def parser(p: Parser) -> None:
    run_argument(p)
    prompts = p.add_argument_group("prompts").add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    prompts.add_argument("--prompt-file", metavar="FILE", help="one prompt, the whole file")
    p.add_argument("--tokens", type=whole, default=200, metavar="N", help="at most (200)")
    how = p.add_argument_group("sampling")
    how.add_argument("--temperature", type=number, default=0.8, metavar="X", help="(0.8)")
    how.add_argument("--top-k", type=whole, metavar="N", help="keep the N likeliest tokens")
    how.add_argument("--top-p", type=number, metavar="X", help="keep this much probability")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    how.add_argument("--seed", type=whole, default=0, metavar="N", help="of the draws (0)")
    how.add_argument(
        "--stop", action="append", default=[], metavar="TEXT|ID",
        help="end before this text, or before the token id if it is a number; repeatable (the end "
        "of a document always ends)",
    )


def run(args: Args) -> int:
    import jax

    from attnlab.infer.generate import generate
    from attnlab.infer.sample import SampleConfig
    from attnlab.train.restore import load_run

    sample = SampleConfig(
        temperature=0.0 if args.greedy else args.temperature, top_k=args.top_k, top_p=args.top_p
    )
    texts = _prompts(args)
    _check(args)
    run = load_run(args.folder, step=args.step)
    tokenizer, trainer = run.tokenizer, run.trainer
    ids = [[tokenizer.bos, *tokenizer.encode(text.encode()).tolist()] for text in texts]
    stop_ids = [int(word) for word in args.stop if digits(word)]
    params, layers = jax.device_put((run.params, run.layers), trainer.replicated)
    out = generate(
        (trainer.graphdef, params), ids, new_tokens=args.tokens, sample=sample, state=layers,
        key=jax.random.key(args.seed),
        stop_ids=sorted({tokenizer.bos, *stop_ids}),
    )
    words = [word for word in args.stop if not digits(word)]
    for i, (text, new) in enumerate(zip(texts, out.tokens, strict=True)):
        if len(texts) > 1:
            print(f"--- prompt {i + 1}")
        print(text + cut(tokenizer.decode(new), words))
    return 0


def _check(args: Args) -> None:
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed {args.seed}", "must be in [0, 2**32)", "use --seed 0")
    if "" in args.stop:
        raise ConfigError("--stop ''", "stands before every text", "name a text or a token id")
    for text in args.prompt or ():
        try:
            text.encode()
        except UnicodeEncodeError:  # the shell's bytes as lone surrogates
            fix = "pass UTF-8, or a UTF-8 file with --prompt-file"
            raise ConfigError(f"--prompt {text!r}", "is not valid UTF-8", fix) from None


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
