"""Tokenizers: bytes or a Hugging Face file; training one; tokenising a corpus once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from attnlab.core.errors import DataError
from attnlab.data.corpus import Corpus
from attnlab.data.files import File, file_system, read_file
from attnlab.data.readers import TOKEN_FORMAT, Document

CHUNK = 1 << 24  # ids looked at together
ENCODE_BATCH = 256  # documents encoded together


class Tokenizer(Protocol):
    """What the data pipeline asks of a tokenizer. ``bos`` is the id that starts a document."""

    name: str
    vocab_size: int
    bos: int
    fingerprint: str

    def encode(self, text: bytes) -> np.ndarray:
        """Ids int32 [T] of UTF-8 text, without BOS."""
        ...

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids [T]: BOS is left out, invalid UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """Ids 0..255 are the bytes, BOS is 256."""

    name, vocab_size, bos = "bytes", 257, 256
    fingerprint = hashlib.sha256(b"bytes, bos 256").hexdigest()[:16]

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _known_ids(ids, self)
        return ids[ids != self.bos].astype(np.uint8).tobytes().decode("utf-8", "replace")


class HFTokenizer:
    """A Hugging Face ``tokenizers`` JSON file, local or remote.

    Text is never read as special tokens, and the truncation and padding that the file may ask for
    are off: they would drop text.

    Args:
        path: the JSON file. bos_token: a token of the file that starts every document; None adds
            one id after the file's last.
    """

    def __init__(self, path: str, bos_token: str | None = None):
        tokenizers, raw = _tokenizers(), read_file(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        except Exception as e:  # the package raises bare Exception
            rule = f"is not a tokenizer file of the tokenizers package ({e})"
            raise DataError(f"tokenizer {path}", rule, "name a tokenizer.json") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if bos_token is not None and bos_token not in ids:
            added = [t.content for t in self._tokenizer.get_added_tokens_decoder().values()]
            rule = f"is not in tokenizer {path}"
            fix = f"take one of its added tokens {added[:8]}, or None for an extra id"
            raise DataError(f"bos_token = {bos_token!r}", rule, fix)
        last = max(ids.values(), default=-1)
        self.name = os.path.basename(path)
        self.bos = last + 1 if bos_token is None else ids[bos_token]
        self.vocab_size = max(last, self.bos) + 1
        self.fingerprint = hashlib.sha256(raw + repr(bos_token).encode()).hexdigest()[:16]

    def encode(self, text: bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        strings = [_utf8(text) for text in texts]
        encoded = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = _known_ids(ids, self)
        return self._tokenizer.decode(ids[ids != self.bos].tolist(), skip_special_tokens=False)


class StreamDecoder:
    """Text of ids as they come: ``push`` holds characters back until all their bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._ids, self._done = tokenizer, [], 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes, possibly none."""
        return self._emit(int(token), hold=True)

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD."""
        return self._emit(None, hold=False)

    def _emit(self, token: int | None, hold: bool) -> str:
        # The ids before _done are kept as context: some tokenizers strip the first space.
        self._ids += [] if token is None else [token]
        text = self._tokenizer.decode(self._ids)
        if hold and text.endswith("\ufffd"):
            return ""
        new = text[len(self._tokenizer.decode(self._ids[: self._done])) :]
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return new


def load_tokenizer(spec: str, bos_token: str | None = None) -> Tokenizer:
    """``"bytes"``, or the path of a Hugging Face ``tokenizers`` JSON file, local or remote."""
    if spec != "bytes":
        return HFTokenizer(spec, bos_token)
    if bos_token is not None:
        rule = "the byte tokenizer has its own BOS, id 256"
        raise DataError(f"bos_token = {bos_token!r}", rule, "leave bos_token out")
    return ByteTokenizer()


def train_tokenizer(
    corpus: Corpus, vocab_size: int, out_path: str, *, overwrite: bool = False
) -> HFTokenizer:
    """Train a byte-level BPE on the train split and write its JSON file.

    Deterministic and lossless: every byte is a token. ``vocab_size`` counts the BOS id that
    ``load_tokenizer(out_path)`` adds after the file's own ``vocab_size - 1`` tokens.
    """
    if vocab_size < 257:
        rule = "256 bytes and BOS need at least 257"
        raise DataError(f"vocab_size = {vocab_size}", rule, "use 257 or more")
    tokenizers = _tokenizers()
    _check_out(out_path, corpus, overwrite)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False
    )
    texts = (_utf8(doc.text) for doc in corpus.train if doc.text is not None)
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() < vocab_size - 1:
        rule = f"the corpus yields only {model.get_vocab_size()} tokens and BOS"
        fix = f"use vocab_size = {model.get_vocab_size() + 1} or more text"
        raise DataError(f"vocab_size = {vocab_size}", rule, fix)
    with _parts_of(out_path):
        with _create(f"{out_path}.part") as f:
            f.write(model.to_str(pretty=True).encode("utf-8"))
        _settle(out_path)
    return HFTokenizer(out_path)


def encode_documents(docs: Sequence[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids [T] of each document, starting with BOS.

    Token documents are checked (ids below ``vocab_size``, same tokenizer) and passed on uncopied
    when they start with BOS already.
    """
    for at in range(0, len(docs), ENCODE_BATCH):
        batch = docs[at : at + ENCODE_BATCH]
        encoded = iter(tokenizer.encode_batch([d.text for d in batch if d.tokens is None]))
        for doc in batch:
            if doc.tokens is not None:
                _check_stored(doc, tokenizer)
                ids = doc.tokens
                if len(ids) and ids[0] == tokenizer.bos:
                    yield ids
                    continue
            else:
                ids = next(encoded)
                if (ids == tokenizer.bos).any():
                    rule = f"its text encodes to BOS, id {tokenizer.bos}, which starts documents"
                    fix = "choose a bos_token that text cannot contain, or None for an extra id"
                    raise DataError(f"file {doc.name}", rule, fix)
            row = np.empty(len(ids) + 1, np.int32)
            row[0], row[1:] = tokenizer.bos, ids
            yield row


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, out_dir: str, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json, which ``load_corpus([out_dir])`` reads back.

    The files hold one stream of little-endian ids, every document starting with BOS, so that the
    batches equal those of the text. An empty split has no file. Returns the content of meta.json.
    """
    paths = {name: os.path.join(out_dir, name) for name in ("meta.json", "train.bin", "val.bin")}
    fs, inner = file_system(out_dir)
    if fs.exists(inner) and not fs.isdir(inner):
        raise DataError(f"folder {out_dir}", "is a file", "name a folder")
    for path in paths.values():
        _check_out(path, corpus, overwrite)
    dtype = storage_dtype(tokenizer.vocab_size).newbyteorder("<")
    files: dict[str, dict[str, Any]] = {}
    with _parts_of(*paths.values()):
        for split, docs in (("train", corpus.train), ("val", corpus.val)):
            if not docs:
                continue
            tokens, sha256 = 0, hashlib.sha256()
            with _create(f"{paths[f'{split}.bin']}.part") as f:
                for ids in encode_documents(docs, tokenizer):
                    data = ids.astype(dtype).tobytes()
                    tokens += len(ids)
                    sha256.update(data)
                    f.write(data)
            entry = {"split": split, "tokens": tokens, "text_bytes": text_bytes(docs)}
            files[f"{split}.bin"] = {**entry, "sha256": sha256.hexdigest()}
        meta = {"format": TOKEN_FORMAT, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size}
        meta |= {"bos": tokenizer.bos, "tokenizer": tokenizer.fingerprint}
        meta |= {"tokenizer_name": tokenizer.name, "corpus": corpus.fingerprint, "files": files}
        with _create(f"{paths['meta.json']}.part") as f:
            f.write(json.dumps(meta, indent=1).encode())
        for path in paths.values():  # what was there stays until all of the new is written
            _remove(path)
        for name in (*files, "meta.json"):  # last: a folder without it is unfinished
            _settle(paths[name])
    return meta


def text_bytes(docs: Sequence[Document]) -> int | None:
    """UTF-8 bytes behind the documents; None if that is unknown for one of them."""
    sizes = [d.text_bytes if d.text is None else len(d.text) for d in docs]
    return None if None in sizes else sum(sizes)


def storage_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and int32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def _check_stored(doc: Document, tokenizer: Tokenizer) -> None:
    if doc.tokenizer and doc.tokenizer != tokenizer.fingerprint:
        rule = f"was tokenised by {doc.tokenizer}, not by {tokenizer.name} {tokenizer.fingerprint}"
        raise DataError(f"file {doc.name}", rule, "name the same tokenizer, or tokenise again")
    for at in range(0, len(doc.tokens), CHUNK):
        chunk = doc.tokens[at : at + CHUNK]
        if chunk.max() >= tokenizer.vocab_size:
            i = int(np.argmax(chunk >= tokenizer.vocab_size))
            rule = f"id {at + i} is {chunk[i]}, the vocabulary has {tokenizer.vocab_size}"
            fix = "name the tokenizer that made the ids, and their true token_dtype"
            raise DataError(f"file {doc.name}", rule, fix)


def _known_ids(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    ids = np.asarray(ids, np.int64).reshape(-1)
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        bad = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        rule = f"tokenizer {tokenizer.name} has ids 0..{tokenizer.vocab_size - 1}"
        raise DataError(f"token id {bad}", rule, "decode with the tokenizer of the model")
    return ids


def _utf8(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        rule = f"byte {e.start} (0x{text[e.start]:02x}) is not valid UTF-8"
        raise DataError("text to encode", rule, "pass UTF-8") from None


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        rule = "needs the tokenizers package, which is not installed"
        raise DataError("a tokenizer file", rule, 'pip install "attnlab[hf]"') from None
    return tokenizers


def _check_out(path: str, corpus: Corpus, overwrite: bool) -> None:
    fs, inner = file_system(path)
    full = fs.unstrip_protocol(inner)
    if File(full, "").key in corpus.files:
        rule = "is read by this corpus, so it cannot be written"
        raise DataError(f"file {path}", rule, "name another path")
    if fs.isdir(inner):
        raise DataError(f"file {path}", "is a folder", "name a file")
    if fs.exists(inner) and not overwrite:
        fix = "pass --overwrite (overwrite=True), or another path"
        raise DataError(f"file {path}", "exists", fix)


@contextlib.contextmanager
def _create(path: str) -> Iterator[Any]:
    """A new binary file with its folders."""
    fs, inner = file_system(path)
    try:
        fs.makedirs(os.path.dirname(inner) or ".", exist_ok=True)
        file = fs.open(inner, "wb")
    except OSError as e:
        rule = f"cannot be written ({e.strerror or type(e).__name__})"
        raise DataError(f"file {path}", rule, "check the path and its permissions") from None
    with file as f:
        yield f


@contextlib.contextmanager
def _parts_of(*paths: str) -> Iterator[None]:
    """Leaves no ``.part`` of ``paths`` behind when the block fails."""
    try:
        yield
    except BaseException:
        for path in paths:
            _remove(f"{path}.part")
        raise


def _settle(path: str) -> None:
    """Move ``path.part`` to ``path``."""
    fs, inner = file_system(path)
    fs.mv(f"{inner}.part", inner)


def _remove(path: str) -> None:
    fs, inner = file_system(path)
    if fs.exists(inner):
        fs.rm_file(inner)
