"""Tokenizers, their training, and tokenised folders."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.core.errors import DataError
from attnlab.data.corpus import Corpus, load_corpus
from attnlab.data.readers import Document
from attnlab.data.tokenizer import (
    ByteTokenizer,
    HFTokenizer,
    StreamDecoder,
    load_tokenizer,
    tokenize_corpus,
    train_tokenizer,
)
from attnlab.train.data import build_rows, eval_batches

tokenizers = pytest.importorskip("tokenizers")
TEXT = "the cat sat on the mat, and the other cat saw that. naïve 中文 🙂\r\n\tthe end <|bos|>\n"


def corpus_of(*texts: bytes) -> Corpus:
    docs = [Document(f"{i}.txt", text, None) for i, text in enumerate(texts)]
    return Corpus(docs, docs[:1], "0" * 16, "test")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("bpe") / "tokenizer.json")
    return path, train_tokenizer(corpus_of(TEXT.encode() * 20), 300, path)


def test_bytes():
    tok = load_tokenizer("bytes")
    assert (tok.vocab_size, tok.bos, tok.name) == (257, 256, "bytes")
    ids = tok.encode(TEXT.encode())
    assert ids.dtype == np.int32 and tok.decode(ids) == TEXT
    assert tok.decode([256, 104, 105, 0xFF, 256]) == "hi\ufffd"
    assert tok.encode(b"").shape == (0,) and tok.decode([]) == ""
    with pytest.raises(DataError, match=r"token id 257.*ids 0\.\.256"):
        tok.decode([257])
    with pytest.raises(DataError, match="id 256"):
        load_tokenizer("bytes", bos_token="<s>")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12), st.binary(max_size=8))
def test_stream_decoder_bytes(text, noise):
    tok = ByteTokenizer()
    for raw in (text.encode(), noise, text.encode() + noise):
        stream = StreamDecoder(tok)
        pieces = [stream.push(i) for i in tok.encode(raw)]
        assert "".join(pieces) + stream.flush() == tok.decode(tok.encode(raw))


def test_stream_decoder_holds_characters_back():
    stream = StreamDecoder(ByteTokenizer())
    assert [stream.push(i) for i in "aé".encode()] == ["a", "", "é"]


def test_stream_decoder_hf(trained):
    stream, tok = StreamDecoder(trained[1]), trained[1]
    ids = tok.encode(TEXT.encode())
    assert "".join(stream.push(i) for i in ids) + stream.flush() == TEXT


def test_train_lossless_and_deterministic(trained, tmp_path):
    path, tok = trained
    assert tok.vocab_size == 300 and tok.bos == 299
    raw = TEXT.encode() + bytes(range(1, 128))
    ids = tok.encode(raw)
    assert ids.dtype == np.int32 and ids.max() < tok.bos and len(ids) < len(raw)
    assert tok.decode(ids).encode() == raw and tok.decode([tok.bos, *ids]).encode() == raw
    again = train_tokenizer(corpus_of(TEXT.encode() * 20), 300, str(tmp_path / "b.json"))
    assert again.fingerprint == tok.fingerprint == HFTokenizer(path).fingerprint
    assert (tmp_path / "b.json").read_bytes() == open(path, "rb").read()
    for a, b in zip(tok.encode_batch([raw, b"", b"the"]), (raw, b"", b"the")):
        np.testing.assert_array_equal(a, tok.encode(b))


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=20))
def test_trained_round_trip(trained, text):
    assert trained[1].decode(trained[1].encode(text.encode())) == text


def test_train_errors(trained, tmp_path):
    path = trained[0]
    with pytest.raises(DataError, match=r"tokenizer.json: exists. Fix: pass --overwrite \(ov"):
        train_tokenizer(corpus_of(b"abc"), 257, path)
    with pytest.raises(DataError, match="vocab_size = 256: 256 bytes and BOS need at least 257"):
        train_tokenizer(corpus_of(b"abc"), 256, str(tmp_path / "x.json"))
    with pytest.raises(DataError, match=r"yields only \d+ tokens.*use vocab_size = \d+ or more"):
        train_tokenizer(corpus_of(b"abcabc"), 5000, str(tmp_path / "x.json"))
    assert not (tmp_path / "x.json").exists()
    copy = tmp_path / "copy.json"
    copy.write_text("{}")
    assert train_tokenizer(corpus_of(b"abc"), 257, str(copy), overwrite=True).vocab_size == 257


def test_bos_token_of_the_file(tmp_path):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tok.train_from_iterator(["abc"], trainer)
    tok.enable_truncation(4)
    path = str(tmp_path / "t.json")
    tok.save(path)
    named = load_tokenizer(path, bos_token="<s>")
    assert (named.vocab_size, named.bos) == (257, 0)
    assert load_tokenizer(path).bos == 257 and load_tokenizer(path).vocab_size == 258
    assert named.fingerprint != load_tokenizer(path).fingerprint
    ids = named.encode(b"a <s> b and more")  # not read as BOS, not truncated
    assert 0 not in ids and named.decode(ids) == "a <s> b and more"
    with pytest.raises(DataError, match=r"bos_token = '<bos>'.*added tokens \['<s>'\]"):
        load_tokenizer(path, bos_token="<bos>")


def test_hf_errors(tmp_path, trained, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="not a tokenizer file"):
        load_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(DataError, match=r"byte 1 .* is not valid UTF-8"):
        trained[1].encode(b"a\xff")
    with pytest.raises(DataError, match="token id 300"):
        trained[1].decode([300])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r'pip install "attnlab\[hf\]"'):
        load_tokenizer(trained[0])


def test_remote_tokenizer(trained):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://toks/t.json", "wb") as f:
        f.write(open(trained[0], "rb").read())
    assert load_tokenizer("memory://toks/t.json").fingerprint == trained[1].fingerprint


@pytest.mark.parametrize("place", ["disk", "memory"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenised_folder_gives_the_same_batches(tmp_path, trained, kind, place):
    if place == "memory":
        pytest.importorskip("fsspec")
    tok = ByteTokenizer() if kind == "bytes" else trained[1]
    src = tmp_path / "src"
    src.mkdir()
    for i, text in enumerate(["", "a", TEXT, TEXT * 3, "b\n" * 40, "tail"]):
        (src / f"{i}.txt").write_bytes(text.encode())
    corpus = load_corpus([str(src)], val_fraction=0.4)
    out = str(tmp_path / "out") if place == "disk" else f"memory://{kind}/out"
    meta = tokenize_corpus(corpus, tok, out)
    assert meta["dtype"] == "uint16" and meta["corpus"] == corpus.fingerprint
    back = load_corpus([out])
    assert load_corpus([out]).fingerprint == back.fingerprint
    for split in ("train", "val"):
        a = build_rows(getattr(corpus, split), tok, 7)
        b = build_rows(getattr(back, split), tok, 7)
        assert a.bytes_per_token == b.bytes_per_token and len(a) == len(b)
        for x, y in zip(eval_batches(a, 4), eval_batches(b, 4), strict=True):
            for key in x:
                np.testing.assert_array_equal(x[key], y[key])
    if place == "disk":
        assert np.shares_memory(build_rows(back.train, tok, 7).tokens, back.train[0].tokens)
        files = (f"{out}/train.bin", f"{out}/val.bin")  # named one by one: no token_dtype needed
        named = load_corpus(files[:1], val_data=files[1:])
        assert [len(d.tokens) for d in named.val] == [len(d.tokens) for d in back.val]


def test_tokenised_folder_errors(tmp_path, trained):
    corpus, out = corpus_of(b"some text", b"more text"), tmp_path / "out"
    tokenize_corpus(corpus, ByteTokenizer(), str(out))
    with pytest.raises(DataError, match=r"meta.json: exists. Fix: pass --overwrite \(ov"):
        tokenize_corpus(corpus, ByteTokenizer(), str(out))
    tokenize_corpus(corpus, ByteTokenizer(), str(out), overwrite=True)
    back = load_corpus([str(out)])
    with pytest.raises(DataError, match=r"train.bin: was tokenised by .*, not by tokenizer.json"):
        build_rows(back.train, trained[1], 4)
    with pytest.raises(DataError, match=r"its meta.json says dtype uint16"):
        load_corpus([str(out)], token_dtype="int32")
    whole = (out / "train.bin").read_bytes()
    (out / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"train.bin: 38 bytes are not 20 ids of uint16"):
        load_corpus([str(out)])
    (out / "train.bin").write_bytes(bytes([whole[0], whole[1], whole[2] ^ 1]) + whole[3:])
    for item in (out, out / "train.bin"):
        with pytest.raises(DataError, match=r"train.bin: is damaged or edited: its sha256"):
            load_corpus([str(item)])
    (out / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train.bin: is missing, its meta.json lists it"):
        load_corpus([str(out)])
    assert load_corpus([str(out / "val.bin")]).train
    (out / "train.bin").write_bytes(whole)
    (out / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta.json: is not JSON"):
        load_corpus([str(out)])


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_overwriting_keeps_the_old_folder_until_the_new_one_is_written(tmp_path, place):
    fsspec = pytest.importorskip("fsspec")
    out = str(tmp_path / "out") if place == "disk" else "memory://overwrite/out"
    fs, inner = fsspec.core.url_to_fs(out)

    class Failing(ByteTokenizer):
        def encode(self, text):
            return super().encode(text) if text == b"some text" else 1 / 0

    def content():
        return {p.rpartition("/")[2]: fs.cat_file(p) for p in fs.find(inner)}

    tokenize_corpus(corpus_of(b"some text", b"more text"), ByteTokenizer(), out)
    old = content()
    bad = Corpus(corpus_of(b"some text").train, corpus_of(b"x").train, "1" * 16, "test")
    with pytest.raises(ZeroDivisionError):  # in val.bin, when train.bin is whole
        tokenize_corpus(bad, Failing(), out, overwrite=True)
    assert content() == old and old.keys() == {"train.bin", "val.bin", "meta.json"}
    one = Corpus(corpus_of(b"some text").train, [], "1" * 16, "test")
    tokenize_corpus(one, ByteTokenizer(), out, overwrite=True)
    assert content().keys() == {"train.bin", "meta.json"}


def test_out_must_be_free_and_no_input(tmp_path):
    out = str(tmp_path / "out")
    tokenize_corpus(corpus_of(b"some text", b"more text"), ByteTokenizer(), out)
    (tmp_path / "link").symlink_to(out)
    for item in (out, f"{out}/val.bin", str(tmp_path / "link")):
        with pytest.raises(DataError, match=r"\.bin: is read by this corpus.*another path"):
            tokenize_corpus(load_corpus([item]), ByteTokenizer(), out, overwrite=True)
    (tmp_path / "a.txt").write_text("abc\nabc\n")
    corpus = load_corpus([str(tmp_path / "a.txt")])
    with pytest.raises(DataError, match=r"a\.txt: is read by this corpus"):
        train_tokenizer(corpus, 257, str(tmp_path / "a.txt"), overwrite=True)
    with pytest.raises(DataError, match=r"out: is a folder. Fix: name a file"):
        train_tokenizer(corpus, 257, out, overwrite=True)
    with pytest.raises(DataError, match=r"a\.txt: is a file. Fix: name a folder"):
        tokenize_corpus(corpus, ByteTokenizer(), str(tmp_path / "a.txt"), overwrite=True)
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\)"):
        tokenize_corpus(corpus, ByteTokenizer(), str(tmp_path / "a.txt/out"))


def test_a_tokenizer_file_stays_when_writing_another_fails(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    train_tokenizer(corpus_of(b"abc"), 257, str(path))
    old = path.read_bytes()

    def fail(fs, inner):
        raise OSError("disk full")

    monkeypatch.setattr("attnlab.data.files.LocalFiles.mv", fail)
    with pytest.raises(OSError, match="disk full"):
        train_tokenizer(corpus_of(b"abcabc"), 258, str(path), overwrite=True)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_empty_split_has_no_file(tmp_path):
    (tmp_path / "a.txt").write_text("hello hello")
    corpus = load_corpus([str(tmp_path / "a.txt")], val_fraction=0)
    meta = tokenize_corpus(corpus, ByteTokenizer(), str(tmp_path / "out"))
    assert list(meta["files"]) == ["train.bin"]
    assert json.loads((tmp_path / "out/meta.json").read_text()) == meta
    assert load_corpus([str(tmp_path / "out")]).val == []


def test_text_that_encodes_to_bos(tmp_path):
    class Bad(ByteTokenizer):
        bos = 97

    with pytest.raises(DataError, match=r"file 1.txt: its text encodes to BOS, id 97"):
        build_rows(corpus_of(b"xyz", b"abc").train, Bad(), 4)


def test_import_is_light():
    code = "import sys, attnlab.train.data as d; d.DataConfig()\n"
    code += "print([m for m in ('jax', 'grain', 'tokenizers', 'fsspec') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
