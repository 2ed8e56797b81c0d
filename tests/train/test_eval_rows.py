"""Evaluation on some of the rows: which ones, and their bytes; a tokenizer that has changed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_runs
from tiny_runs import command

from attnlab import cli
from attnlab.data.corpus import load_corpus
from attnlab.data.tokenizer import ByteTokenizer, train_tokenizer
from attnlab.train.data import build_rows, bytes_per_token, eval_batches


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Half of it short words, half of it one long word a line: bytes a token differ by place."""
    folder = tmp_path_factory.mktemp("text")
    lines = ["a b c d e f g h"] * 150 + ["internationalisation internationalisation"] * 150
    (folder / "text.txt").write_text("\n".join(lines))
    return folder / "text.txt"


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_bytes_of_the_chosen_rows(text, tmp_path, packing):
    pytest.importorskip("tokenizers")
    corpus = load_corpus([str(text)], val_fraction=0)
    tokenizer = train_tokenizer(corpus, 280, str(tmp_path / "tok.json"))
    rows = build_rows(corpus.train, tokenizer, 16, packing=packing)
    whole = bytes_per_token(rows, tokenizer)
    assert whole == rows.bytes_per_token == pytest.approx(
        text.stat().st_size / (len(rows.tokens)), rel=1e-9
    )
    for limit in (1, 5, 12):
        size = count = 0
        for batch in eval_batches(rows, 4, limit=limit):
            targets = batch["targets"][batch["loss_mask"] > 0]
            count += len(targets)
            size += sum(len(tokenizer.decode([t])) for t in targets if t != tokenizer.bos)
        assert bytes_per_token(rows, tokenizer, limit) == pytest.approx(size / count, rel=1e-9)
    assert bytes_per_token(rows, tokenizer, 1) != pytest.approx(whole, rel=0.05)
    assert bytes_per_token(rows, tokenizer, 10**6) == whole


def test_the_rows_are_spread(text):
    rows = build_rows(load_corpus([str(text)], val_fraction=0).train, ByteTokenizer(), 16)
    got = np.concatenate([b["tokens"] for b in eval_batches(rows, 4, limit=8)])
    assert len(got) == 8
    want = [rows[i * len(rows) // 8]["tokens"] for i in range(8)]
    np.testing.assert_array_equal(got, want)
    assert bytes_per_token(rows, ByteTokenizer(), 8) == pytest.approx(1, abs=1e-9)


def test_another_tokenizer_is_refused(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    data = tiny_runs.corpus(tmp_path)
    path, out = tmp_path / "tok.json", tmp_path / "run"
    train_tokenizer(load_corpus([data[1]]), 270, str(path))
    more = ["--tokenizer", str(path), "--set", "model.vocab_size=270"]
    assert cli.main(command(data, out, *more, steps=2)) == 0
    assert cli.main(["eval", str(out)]) == 0
    (tmp_path / "other.txt").write_text("zyxwvu zyxwvu zyxwvu " * 50)
    train_tokenizer(load_corpus([str(tmp_path / "other.txt")]), 263, str(path), overwrite=True)
    for argv in (["eval", str(out)], ["generate", str(out), "--prompt", "x"]):
        capsys.readouterr()
        assert cli.main(argv) == 1
        assert "the run was trained with" in capsys.readouterr().err
