"""Readers: from one file to its documents.

Text stays bytes: no newline is translated.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator

import numpy as np

from attnlab.core.errors import DataError
from attnlab.data.files import File, file_system, read_file

REFUSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".parquet", ".arrow", ".pdf")
TOKEN_FORMAT = "attnlab-tokens-1"  # "format" in the meta.json that tokenize_corpus writes


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: text or token ids, never both.

    Args:
        name: relative path, with ``:line`` for JSON lines. text: UTF-8 bytes. tokens: integers [T],
            possibly memory-mapped; every BOS id inside starts a new document.
        text_bytes: UTF-8 bytes behind ``tokens`` where known. tokenizer: fingerprint of the
            tokenizer that made ``tokens`` where known.
    """

    name: str
    text: bytes | None
    tokens: np.ndarray | None
    text_bytes: int | None = None
    tokenizer: str | None = None

    def __len__(self) -> int:
        return len(self.text if self.tokens is None else self.tokens)


@dataclasses.dataclass(eq=False)
class Entry:
    """A document, its place in the sort order and, where a meta.json fixes them, split and hash."""

    file: str
    line: int
    doc: Document
    split: str | None = None
    sha256: str | None = None

    @functools.cached_property
    def hash(self) -> float:
        name = self.doc.name.encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.sha256(name).digest(), "big") / 2**256

    @functools.cached_property
    def digest(self) -> str:
        """One line of the fingerprint: name, kind, length, sha256 of the content."""
        doc, tokens = self.doc, self.doc.tokens
        kind = "text" if tokens is None else tokens.dtype.name
        content = doc.text if tokens is None else np.ascontiguousarray(tokens)
        sha256 = self.sha256 or hashlib.sha256(content).hexdigest()
        return f"{doc.name!r} {kind} {len(doc)} {sha256}"


def read_entries(
    file: File, text_field: str, token_dtype: str | None, is_folder: bool
) -> Iterator[Entry]:
    """The documents of ``file``; one named alone, not through its folder, keeps no stored split."""
    name = file.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(file, text_field)
    elif name.endswith((".npy", ".bin")):
        entry = _read_npy(file) if name.endswith(".npy") else _read_bin(file, token_dtype)
        tokens = entry.doc.tokens
        if tokens.dtype.kind == "i" and len(tokens) and tokens.min() < 0:
            at = int(np.argmax(tokens < 0))
            rule = f"id {at} is {tokens[at]}, ids must be >= 0"
            raise DataError(str(file), rule, "write the ids again, or name their true dtype")
        entry.split = entry.split if is_folder else None
        yield entry
    elif name.endswith(REFUSED_SUFFIXES):
        rule = "is not text, JSON lines or a token array"
        raise DataError(str(file), rule, "convert it to .txt, .jsonl or .jsonl.gz")
    else:
        text = file.read()
        _decode(text, str(file), 1)
        yield Entry(file.name, 0, Document(file.name, text, None))


def _decode(text: bytes, where: str, line: int) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        line += text.count(b"\n", 0, e.start)
        rule = f"byte {e.start} (0x{text[e.start]:02x}) is not valid UTF-8"
        raise DataError(f"{where}, line {line}", rule, "convert the file to UTF-8") from None


def _read_jsonl(file: File, text_field: str) -> Iterator[Entry]:
    raw = file.read()
    if file.name.lower().endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e:
            raise DataError(str(file), f"is not whole gzip ({e})", "compress it again") from None
    for number, line in enumerate(io.BytesIO(raw), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(_decode(line, str(file), number))
        except json.JSONDecodeError as e:
            rule = f"is not JSON ({e.msg} at column {e.colno})"
            raise DataError(where, rule, "write one JSON object a line") from None
        except (ValueError, RecursionError) as e:
            if isinstance(e, DataError):
                raise
            raise DataError(where, f"cannot be read ({e})", "write a plain JSON object") from None
        if not isinstance(record, dict):
            rule = f"must be a JSON object, is a {type(record).__name__}"
            raise DataError(where, rule, f'write {{"{text_field}": "..."}}')
        if text_field not in record:
            rule = f"has no field {text_field!r}, only {sorted(record)}"
            raise DataError(where, rule, "name the field that holds the text with --text-field")
        text = record[text_field]
        if not isinstance(text, str):
            rule = f"field {text_field!r} must be a string, is {type(text).__name__} {text!r:.40}"
            raise DataError(where, rule, "name another text_field or mend the line")
        try:
            doc = Document(f"{file.name}:{number}", text.encode("utf-8"), None)
        except UnicodeEncodeError as e:
            rule = f"field {text_field!r} holds half a surrogate pair at character {e.start}"
            raise DataError(where, rule, "write the character as UTF-8") from None
        yield Entry(file.name, number, doc)


def _read_npy(file: File) -> Entry:
    try:
        source = file.path if file.local else io.BytesIO(file.read())
        tokens = np.load(source, mmap_mode="r" if file.local else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(str(file), f"is not a whole .npy file ({e})", "np.save it again") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        rule = f"must hold integers [T], holds {tokens.dtype} {list(tokens.shape)}"
        raise DataError(str(file), rule, "save token ids as np.uint16 or np.int32, one dimension")
    return Entry(file.name, 0, Document(file.name, None, tokens))


def _read_bin(file: File, token_dtype: str | None) -> Entry:
    """A raw array; a meta.json of ``tokenize_corpus`` beside it says dtype, split and hash."""
    meta = _read_meta(os.path.join(os.path.dirname(file.path), "meta.json"))
    entry = meta.get("files", {}).get(os.path.basename(file.path), {})
    stored = meta.get("dtype") if entry else None
    if token_dtype is None and stored is None:
        rule = "raw token ids do not say their dtype"
        raise DataError(str(file), rule, 'pass token_dtype, e.g. token_dtype="uint16"')
    dtype = check_token_dtype(token_dtype or stored)
    if entry and dtype != check_token_dtype(stored):
        rule = f"its meta.json says dtype {stored}"
        raise DataError(f"{file} with token_dtype = {token_dtype!r}", rule, "leave token_dtype out")
    raw = None if file.local else file.read()
    size = os.path.getsize(file.path) if file.local else len(raw)
    count = entry.get("tokens", size // dtype.itemsize)
    if size != count * dtype.itemsize:
        expected = f"{entry['tokens']} ids" if entry else "a whole number of ids"
        rule = f"{size} bytes are not {expected} of {dtype.name} ({dtype.itemsize} bytes each)"
        raise DataError(str(file), rule, "write the file again or name its true token_dtype")
    mapped = file.local and size > 0  # an empty file cannot be mapped
    tokens = np.memmap(file.path, dtype, "r") if mapped else np.frombuffer(raw or b"", dtype)
    tokenizer = meta["tokenizer"] if entry else None
    # Read whole once: what the run and its corpus fingerprint are about must be what is trained on.
    sha256 = hashlib.sha256(tokens).hexdigest() if entry else None
    if entry and sha256 != entry.get("sha256"):
        rule = "is damaged or edited: its sha256 is not the one in meta.json"
        raise DataError(str(file), rule, "tokenise the corpus again")
    doc = Document(file.name, None, tokens, entry.get("text_bytes"), tokenizer)
    return Entry(file.name, 0, doc, entry.get("split"), sha256)


def check_listed(files: list[File]) -> None:
    """DataError if one of ``files`` is a meta.json that lists a file which is not among them."""
    paths = {f.path for f in files}
    for meta in (f for f in files if os.path.basename(f.name) == "meta.json"):
        try:
            listed = _read_meta(meta.path).get("files", {})
        except DataError:  # of another program, or reported by the .bin beside it
            continue
        for name in listed:
            path = os.path.join(os.path.dirname(meta.path), name)
            if path not in paths:
                rule = "is missing, its meta.json lists it"
                raise DataError(f"file {path}", rule, "tokenise the corpus again")


def _read_meta(path: str) -> dict:
    fs, inner = file_system(path)
    if not fs.exists(inner):
        return {}
    try:
        meta = json.loads(read_file(path))
    except ValueError as e:
        raise DataError(f"file {path}", f"is not JSON ({e})", "tokenise the corpus again") from None
    return meta if isinstance(meta, dict) and meta.get("format") == TOKEN_FORMAT else {}


def check_token_dtype(name: str) -> np.dtype:
    """The little-endian integer dtype called ``name``, or a DataError."""
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "iu":
        rule = "must be an integer dtype"
        raise DataError(f"token_dtype = {name!r}", rule, 'use "uint16", "uint32" or "int32"')
    return dtype.newbyteorder("<")
