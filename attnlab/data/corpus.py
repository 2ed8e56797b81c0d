"""Corpora: text and token files, local or remote, split into train and val the same way everywhere.

The split hashes the name of a document (its path relative to the folder or glob it came from; for
JSON lines path and line number), so it does not depend on the machine or on the order of the files:

1. a document is val when sha256(name) / 2^256 < ``val_fraction``, else train;
2. if only one document has any content it is cut in two: the leading part is train, the trailing
   ``val_fraction`` is val; text is cut after a newline (else between characters), tokens anywhere;
3. else, if val got no content, the non-empty document with the smallest hash moves to val; if train
   got none, the one with the largest hash moves to train.

A folder written by ``tokenize_corpus`` keeps the split it was written with. ``val_data`` replaces
the rule: all of ``data`` is train, all of ``val_data`` is val. ``val_fraction=0`` leaves val empty.
Text stays bytes: no newline is translated.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnlab.core.errors import DataError

TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .py .pyi .jl .c .h .cc .cpp .hpp .cu .go .rs .java .js .sh".split()
)
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".npy", ".bin")
REFUSED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".parquet", ".arrow", ".pdf")
TOKEN_FORMAT = "attnlab-tokens-1"  # "format" in the meta.json that tokenize_corpus writes
EMBEDDED_WITHOUT = frozenset(
    "site-packages dist-packages test tests idlelib encodings pydoc_data".split()
)


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


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of both splits, sorted by name.

    Args:
        fingerprint: 16 hex digits of names, contents and split: equal on every machine that holds
            the same files. description: one line for logs, says what was left out.
    """

    train: list[Document]
    val: list[Document]
    fingerprint: str
    description: str


@dataclasses.dataclass(eq=False)
class _Entry:
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


class LocalFiles:
    """The local disk, with the fsspec methods used here."""

    exists, isdir = staticmethod(os.path.exists), staticmethod(os.path.isdir)
    makedirs, open, rm_file = staticmethod(os.makedirs), staticmethod(open), staticmethod(os.remove)
    unstrip_protocol = staticmethod(str)

    @staticmethod
    def find(root: str, without: frozenset[str] = frozenset()) -> list[str]:
        """Every file below ``root``; linked folders are followed once."""
        found, seen = [], set()
        for folder, folders, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = [] if real in seen else [f for f in folders if f not in without]
            found += [] if real in seen else [os.path.join(folder, f) for f in files]
            seen.add(real)
        return found

    @staticmethod
    def glob(pattern: str) -> list[str]:
        return glob.glob(pattern, recursive=True)

    @staticmethod
    def cat_file(path: str) -> bytes:
        with open(path, "rb") as f:
            return f.read()


def file_system(path: str) -> tuple[Any, str]:
    """``(file system, path on it)``: the local disk, or fsspec for a path with a scheme."""
    if "://" not in path:
        return LocalFiles, os.path.expanduser(path)
    try:
        import fsspec
    except ImportError:
        rule = "a path with a scheme needs fsspec, which is not installed"
        raise DataError(path, rule, 'pip install "attnlab[gcs]"') from None
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as e:
        rule = f"no file system serves it ({e})"
        raise DataError(path, rule, 'pip install "attnlab[gcs]"') from None


def read_file(path: str) -> bytes:
    """The bytes of a local or remote file, or a DataError that says why not."""
    fs, inner = file_system(path)
    try:
        return fs.cat_file(inner)
    except OSError as e:
        rule = f"cannot be read ({e.strerror or type(e).__name__})"
        raise DataError(f"file {path}", rule, "check the path and its permissions") from None


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to read: full path (with scheme), name relative to its root."""

    path: str
    name: str

    @property
    def local(self) -> bool:
        return "://" not in self.path

    def read(self) -> bytes:
        return read_file(self.path)

    def __str__(self) -> str:
        return f"file {self.path}"


def _list_files(item: str) -> tuple[list[_File], bool]:
    """The files of one item, and whether it is a folder."""
    fs, path = file_system(item)
    if fs.isdir(path):
        root, paths, kind = path, fs.find(path), "folder"
    elif fs.exists(path):
        root, paths, kind = os.path.dirname(path), [path], "file"
    elif any(c in path for c in "*?["):
        fixed = itertools.takewhile(lambda part: not any(c in part for c in "*?["), path.split("/"))
        root, kind = "/".join(fixed), "glob"
        paths = [p for p in fs.glob(path) if not fs.isdir(p)]
    else:
        rule = "does not exist"
        raise DataError(f"data item {item!r}", rule, 'name a file, a folder, a glob or "stdlib"')
    files = [_File(fs.unstrip_protocol(p), _relative(p, root)) for p in paths]
    if kind == "folder":
        files = [f for f in files if not f.name.startswith(".") and "/." not in f.name]
    if not files:
        fix = "check the path; ** matches folders" if kind == "glob" else "put text files into it"
        raise DataError(f"{kind} {item}", "matches no file", fix)
    return sorted(files, key=lambda f: f.name), kind == "folder"


def _relative(path: str, root: str) -> str:
    name = path[len(root) :] if path.startswith(root) else path
    return name.replace(os.sep, "/").lstrip("/")


def load_corpus(
    data: Sequence[str] = ("stdlib",),
    *,
    val_data: Sequence[str] = (),
    text_field: str = "text",
    token_dtype: str | None = None,
    val_fraction: float = 0.05,
) -> Corpus:
    """Read and split a corpus.

    Args:
        data: each item is ``stdlib`` (the Python standard library's own source, about 9 MB),
            ``stdlib+packages`` (plus the source of the installed packages), a file, a folder (read
            recursively, hidden files not), or a glob (``**`` too); with a scheme (``gs://...``)
            through fsspec. Files are UTF-8 text, ``.jsonl`` / ``.jsonl.gz`` with one document a
            line (blank lines hold none), or token ids: ``.npy`` or raw little-endian ``.bin``.
        val_data: the same, all of it val. text_field: the JSON field that holds the text.
        token_dtype: integer dtype of ``.bin`` files, e.g. ``"uint16"``.
        val_fraction: share of val, in [0, 1).
    """
    if isinstance(data, str) or isinstance(val_data, str):
        raise DataError(f"data = {data!r}", "must be a list of items", "write (item,)")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction = {val_fraction}", "must be in [0, 1)", "use 0.05")
    seen: dict[str, str] = {}
    notes: list[str] = []
    entries = _load(data, seen, notes, text_field, token_dtype)
    if not any(len(e.doc) for e in entries):
        raise DataError(f"data = {tuple(data)}", "holds no text at all", "name other files")
    if val_data:
        train, rule = entries, "val_data"
        val = _load(val_data, seen, notes, text_field, token_dtype)
        if not any(len(e.doc) for e in val):
            raise DataError(f"val_data = {tuple(val_data)}", "holds no text", "name other files")
    else:
        train, val, rule = *_split(entries, val_fraction), f"sha256(name) < {val_fraction}"
    lines = [f"train {e.digest}" for e in train] + [f"val {e.digest}" for e in val]
    fingerprint = hashlib.sha256("\n".join([*sorted(lines), rule]).encode()).hexdigest()[:16]
    size = sum(e.doc.tokens is None and len(e.doc) for e in (*train, *val))
    tokens = sum(e.doc.tokens is not None and len(e.doc) for e in (*train, *val))
    description = f"{', '.join(data)}: {len(train)} train and {len(val)} val documents"
    description += f", {size / 1e6:.1f} MB of text" if size else ""
    description += f", {tokens} stored tokens" if tokens else ""
    description = "; ".join([description, *notes])
    return Corpus([e.doc for e in train], [e.doc for e in val], fingerprint, description)


def _load(data, seen, notes, text_field, token_dtype) -> list[_Entry]:
    entries: list[_Entry] = []
    for item in data:
        embedded = item in ("stdlib", "stdlib+packages")
        files, is_folder = (_embedded(item), True) if embedded else _list_files(item)
        if is_folder and not embedded:
            files = _take_known(item, files, notes)
        for file in files:
            key = os.path.realpath(file.path) if file.local else file.path
            if key in seen:
                rule = f"comes from both {seen[key]!r} and {item!r}"
                raise DataError(str(file), rule, "name each file once, in data or in val_data")
            seen[key] = item
            entries += _read(file, text_field, token_dtype, is_folder)
    return sorted(entries, key=lambda e: (e.file, e.line, e.digest))


def _embedded(item: str) -> list[_File]:
    """Python source without tests, and without files that the build of this Python generated."""
    files = []
    for word in item.split("+"):
        root = sysconfig.get_path("stdlib" if word == "stdlib" else "purelib")
        for path in LocalFiles.find(root, EMBEDDED_WITHOUT):
            name = _relative(path, root)
            generated = word == "stdlib" and name.startswith(("config-", "_sysconfigdata"))
            if name.endswith(".py") and not generated:
                files.append(_File(path, f"{word}/{name}"))
    if not files:
        raise DataError(f"data = {item!r}", f"no *.py under {root}", "name a file or a folder")
    return files


def _take_known(item: str, files: list[_File], notes: list[str]) -> list[_File]:
    taken = [f for f in files if f.name.lower().endswith(FOLDER_SUFFIXES)]
    rest = Counter(
        os.path.splitext(f.name)[1] or "no suffix" for f in files
        if f not in taken and os.path.basename(f.name) != "meta.json"
    )  # fmt: skip
    found = ", ".join(f"{n} {suffix}" for suffix, n in sorted(rest.items())) or "nothing"
    if not taken:
        rule = f"a folder is read for {' '.join(FOLDER_SUFFIXES)}, and this one holds {found}"
        raise DataError(f"folder {item}", rule, "name its files, or a glob: both are read as text")
    if rest:
        notes.append(f"left out of {item}: {found}")
        warnings.warn(f"attnlab: {notes[-1]} (a glob reads any suffix as text)", stacklevel=4)
    return taken


def _read(file: _File, text_field: str, token_dtype, is_folder: bool) -> Iterator[_Entry]:
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
        yield _Entry(file.name, 0, Document(file.name, text, None))


def _decode(text: bytes, where: str, line: int) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        line += text.count(b"\n", 0, e.start)
        rule = f"byte {e.start} (0x{text[e.start]:02x}) is not valid UTF-8"
        raise DataError(f"{where}, line {line}", rule, "convert the file to UTF-8") from None


def _read_jsonl(file: _File, text_field: str) -> Iterator[_Entry]:
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
        if not isinstance(record, dict):
            rule = f"must be a JSON object, is a {type(record).__name__}"
            raise DataError(where, rule, f'write {{"{text_field}": "..."}}')
        if text_field not in record:
            rule = f"has no field {text_field!r}, only {sorted(record)}"
            raise DataError(where, rule, "name the field that holds the text in text_field")
        text = record[text_field]
        if not isinstance(text, str):
            rule = f"field {text_field!r} must be a string, is {type(text).__name__} {text!r:.40}"
            raise DataError(where, rule, "name another text_field or mend the line")
        try:
            doc = Document(f"{file.name}:{number}", text.encode("utf-8"), None)
        except UnicodeEncodeError as e:
            rule = f"field {text_field!r} holds half a surrogate pair at character {e.start}"
            raise DataError(where, rule, "write the character as UTF-8") from None
        yield _Entry(file.name, number, doc)


def _read_npy(file: _File) -> _Entry:
    try:
        source = file.path if file.local else io.BytesIO(file.read())
        tokens = np.load(source, mmap_mode="r" if file.local else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(str(file), f"is not a whole .npy file ({e})", "np.save it again") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        rule = f"must hold integers [T], holds {tokens.dtype} {list(tokens.shape)}"
        raise DataError(str(file), rule, "save token ids as np.uint16 or np.int32, one dimension")
    return _Entry(file.name, 0, Document(file.name, None, tokens))


def _read_bin(file: _File, token_dtype: str | None) -> _Entry:
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
    doc = Document(file.name, None, tokens, entry.get("text_bytes"), tokenizer)
    return _Entry(file.name, 0, doc, entry.get("split"), entry.get("sha256"))


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


def _split(entries: list[_Entry], val_fraction: float) -> tuple[list[_Entry], list[_Entry]]:
    """Train and val by the rules of the module docstring."""
    free = [e for e in entries if e.split is None]
    full = [e for e in free if len(e.doc)]
    if len(full) == 1 and len(entries) == len(free) and val_fraction:
        head, tail = _cut(full[0], val_fraction)
        return [head if e is full[0] else e for e in entries], [tail]
    val = {id(e) for e in free if e.hash < val_fraction}
    val |= {id(e) for e in entries if e.split == "val"}
    if full and val_fraction and not any(len(e.doc) for e in entries if id(e) in val):
        val.add(id(min(full, key=lambda e: e.hash)))
    if full and not any(len(e.doc) for e in entries if id(e) not in val):
        val.remove(id(max(full, key=lambda e: e.hash)))
    return [e for e in entries if id(e) not in val], [e for e in entries if id(e) in val]


def _cut(entry: _Entry, val_fraction: float) -> tuple[_Entry, _Entry]:
    doc, n = entry.doc, len(entry.doc)
    at = min(max(int(n * (1 - val_fraction)), 1), n - 1)
    if doc.text is not None:
        line = doc.text.rfind(b"\n", 0, at) + 1 or doc.text.find(b"\n", at) + 1
        at = line if 0 < line < n else at
        while 0 < at < n and doc.text[at] & 0xC0 == 0x80:  # inside a UTF-8 character
            at += 1
    if not 0 < at < n:
        rule = "is too small to be cut into train and val"
        raise DataError(f"file {doc.name}, {n} long", rule, "name more files, or val_data")
    pieces = []
    for part in (slice(0, at), slice(at, n)):
        text, tokens = (x if x is None else x[part] for x in (doc.text, doc.tokens))
        name = f"{doc.name}[{part.start}:{part.stop}]"
        pieces.append(_Entry(entry.file, 0, Document(name, text, tokens, None, doc.tokenizer)))
    return pieces[0], pieces[1]
