"""Files of a corpus: the local disk, or fsspec for a path with a scheme."""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import pathlib
from typing import Any

from attnlab.core.errors import DataError


class LocalFiles:
    """The local disk, with the fsspec methods used here."""

    exists, isdir = staticmethod(os.path.exists), staticmethod(os.path.isdir)
    makedirs, open, rm_file = staticmethod(os.makedirs), staticmethod(open), staticmethod(os.remove)
    mv = staticmethod(os.replace)
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
class File:
    """A file to read: full path (with scheme), name relative to its root."""

    path: str
    name: str

    @property
    def local(self) -> bool:
        return "://" not in self.path

    @property
    def key(self) -> str:
        """The same for every path of one file."""
        return os.path.realpath(self.path) if self.local else self.path

    def read(self) -> bytes:
        return read_file(self.path)

    def __str__(self) -> str:
        return f"file {self.path}"


def list_files(item: str) -> tuple[list[File], bool, list[str]]:
    """The files of one item, whether it is a folder, and what of it is left out."""
    fs, path = file_system(item)
    left = []
    if fs.isdir(path):
        root, paths, kind = path, fs.find(path), "folder"
    elif fs.exists(path):
        root, paths, kind = os.path.dirname(path), [path], "file"
    elif any(c in path for c in "*?["):
        fixed = itertools.takewhile(lambda part: not any(c in part for c in "*?["), path.split("/"))
        root, kind = "/".join(fixed), "glob"
        found = fs.glob(path)
        paths = [p for p in found if not fs.isdir(p)]
        held = {str(folder) for p in paths for folder in pathlib.PurePosixPath(p).parents}
        matched = {p.rstrip("/") for p in found} - {p.rstrip("/") for p in paths}
        if lost := sum(bool(fs.find(folder)) for folder in matched - held):
            left = [f"{lost} folder{'s' * (lost > 1)} (** reads folders)"]
    else:
        rule = "does not exist"
        raise DataError(f"data item {item!r}", rule, 'name a file, a folder, a glob or "stdlib"')
    files = [File(fs.unstrip_protocol(p), relative(p, root)) for p in paths]
    if kind == "folder":
        seen = [f for f in files if not f.name.startswith(".") and "/." not in f.name]
        left = [f"{len(files) - len(seen)} hidden"] if len(seen) < len(files) else []
        files = seen
    if not files:
        fix = "check the path; ** matches folders" if kind == "glob" else "put text files into it"
        rule = f"matches no file{', only ' * bool(left)}{', '.join(left)}"
        raise DataError(f"{kind} {item}", rule, fix)
    return sorted(files, key=lambda f: f.name), kind == "folder", left


def relative(path: str, root: str) -> str:
    """The name of a file below ``root``, with forward slashes."""
    name = path[len(root) :] if path.startswith(root) else path
    return name.replace(os.sep, "/").lstrip("/")
