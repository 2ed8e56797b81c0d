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
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Sequence

from attnlab.core.errors import DataError
from attnlab.data.files import File, LocalFiles, list_files, relative
from attnlab.data.readers import Document, Entry, check_listed, read_entries

TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .py .pyi .jl .c .h .cc .cpp .hpp .cu .go .rs .java .js .sh".split()
)
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".npy", ".bin")
EMBEDDED_WITHOUT = frozenset(
    "site-packages dist-packages test tests idlelib encodings pydoc_data".split()
)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of both splits, sorted by name.

    Args:
        fingerprint: 16 hex digits of names, contents and split: equal on every machine that holds
            the same files. description: one line for logs, says what was left out. files: the
            keys of the files that were read.
    """

    train: list[Document]
    val: list[Document]
    fingerprint: str
    description: str
    files: frozenset[str] = frozenset()


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
    docs = [e.doc for e in train], [e.doc for e in val]
    return Corpus(*docs, fingerprint, description, frozenset(seen))


def _load(data, seen, notes, text_field, token_dtype) -> list[Entry]:
    entries: list[Entry] = []
    for item in data:
        embedded = item in ("stdlib", "stdlib+packages")
        files, is_folder, left = (_embedded(item), True, []) if embedded else list_files(item)
        if is_folder and not embedded:
            check_listed(files)
            files, unknown = _take_known(item, files)
            left += [f"{', '.join(unknown)} (a glob reads any suffix as text)"] if unknown else []
        if left:
            notes.append(f"left out of {item}: {', '.join(left)}")
            warnings.warn(f"attnlab: {notes[-1]}", stacklevel=3)
        for file in files:
            if file.key in seen:
                rule = f"comes from both {seen[file.key]!r} and {item!r}"
                raise DataError(str(file), rule, "name each file once, in data or in val_data")
            seen[file.key] = item
            entries += read_entries(file, text_field, token_dtype, is_folder)
    return sorted(entries, key=lambda e: (e.file, e.line, e.digest))


def _embedded(item: str) -> list[File]:
    """Python source without tests, and without files that the build of this Python generated."""
    files = []
    for word in item.split("+"):
        root = sysconfig.get_path("stdlib" if word == "stdlib" else "purelib")
        for path in LocalFiles.find(root, EMBEDDED_WITHOUT):
            name = relative(path, root)
            generated = word == "stdlib" and name.startswith(("config-", "_sysconfigdata"))
            if name.endswith(".py") and not generated:
                files.append(File(path, f"{word}/{name}"))
    if not files:
        raise DataError(f"data = {item!r}", f"no *.py under {root}", "name a file or a folder")
    return files


def _take_known(item: str, files: list[File]) -> tuple[list[File], list[str]]:
    """The files that a folder is read for, and the count of the others by suffix."""
    taken = [f for f in files if f.name.lower().endswith(FOLDER_SUFFIXES)]
    rest = Counter(
        os.path.splitext(f.name)[1] or "no suffix" for f in files
        if f not in taken and os.path.basename(f.name) != "meta.json"
    )  # fmt: skip
    found = [f"{n} {suffix}" for suffix, n in sorted(rest.items())]
    if not taken:
        rule = f"a folder is read for {' '.join(FOLDER_SUFFIXES)}, "
        rule += f"and this one holds {', '.join(found) or 'nothing'}"
        raise DataError(f"folder {item}", rule, "name its files, or a glob: both are read as text")
    return taken, found


def _split(entries: list[Entry], val_fraction: float) -> tuple[list[Entry], list[Entry]]:
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


def _cut(entry: Entry, val_fraction: float) -> tuple[Entry, Entry]:
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
        pieces.append(Entry(entry.file, 0, Document(name, text, tokens, None, doc.tokenizer)))
    return pieces[0], pieces[1]
