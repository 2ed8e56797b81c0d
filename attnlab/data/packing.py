"""Packing: a stream of documents cut into rows of one length, as NumPy arrays.

A row is a dict of arrays [T]: ``tokens, targets, positions, segments`` int32 and ``loss_mask``
float32. Segment 0 is padding. The target of a token is the one after it in its document, and BOS
where the document ends, so that a model learns to stop. Every token predicts exactly once.
"""

from __future__ import annotations

import numpy as np

from attnlab.core.errors import ConfigError, DataError

PACKINGS = ("concat", "fit")
Row = dict[str, np.ndarray]


class PackedRows:
    """Random access to the rows of one epoch, cut from the token stream when asked for.

    ``concat``: row i is ``stream[i*T : i*T + T]``; the last one is padded. ``fit``: documents are
    cut into pieces of at most T tokens and packed first-fit decreasing, a piece never crosses a
    row and the pieces of a row keep the order of the stream. Padding is 0 in every array.

    Args:
        tokens: ids of all documents end to end, BOS first in each; may be memory-mapped.
        doc_starts: where the documents start, ascending, the first is 0. seq_len: T.
        packing: "concat" or "fit". document_mask: True numbers the documents of a row as segments
            1, 2, ... with positions that restart at 0; False makes a row one segment (plain causal
            attention). text_bytes: UTF-8 bytes behind the tokens where known.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        doc_starts: np.ndarray,
        seq_len: int,
        bos: int,
        packing: str = "concat",
        document_mask: bool = True,
        *,
        text_bytes: int | None = None,
    ):
        check_packing(packing)
        if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 1:
            raise ConfigError(f"seq_len = {seq_len!r}", "must be a positive integer", "use 256")
        self.tokens, self.doc_starts = tokens, np.asarray(doc_starts, np.int64)
        self.seq_len, self.bos, self.packing = seq_len, bos, packing
        self.document_mask, self.text_bytes = document_mask, text_bytes
        starts = self.doc_starts
        if not len(starts) or starts[0] != 0 or (np.diff(starts) < 1).any():
            rule = "must ascend from 0"
            raise DataError(f"doc_starts = {starts[:4]}...", rule, "use build_rows")
        if starts[-1] >= len(tokens) or (tokens[starts] != bos).any():
            rule = f"each must be the place of a BOS, id {bos}"
            raise DataError(f"doc_starts = {starts[:4]}...", rule, "use build_rows")
        if len(tokens) == len(starts):
            rule = f"hold no token but {len(starts)} BOS, nothing to predict"
            raise DataError("the documents", rule, "name a corpus with text in this split")
        if packing == "fit":
            self._pieces, self._row_pieces = self._fit()
            self._len = len(self._row_pieces) - 1
        else:
            self._len = -(-len(tokens) // seq_len)

    def __len__(self) -> int:
        return self._len

    def __repr__(self) -> str:
        size = f"{len(self)} rows of {self.seq_len}, {len(self.tokens)} tokens"
        return f"PackedRows({size}, {len(self.doc_starts)} documents, {self.packing})"

    @property
    def num_targets(self) -> int:
        """Targets with loss in one epoch: the tokens of all documents, and one end each."""
        return len(self.tokens)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per target; None for token arrays whose text is unknown."""
        return None if self.text_bytes is None else self.text_bytes / self.num_targets

    @property
    def fill(self) -> float:
        """Share of the row places that hold tokens rather than padding."""
        places = len(self) * self.seq_len
        return len(self.tokens) / places

    def __getitem__(self, i: int) -> Row:
        """Row ``i``: five arrays [T]."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self._concat_row(int(i)) if self.packing == "concat" else self._fit_row(int(i))

    def empty_row(self) -> Row:
        """A row of padding."""
        keys = ("tokens", "targets", "positions", "segments")
        row = {key: np.zeros(self.seq_len, np.int32) for key in keys}
        return {**row, "loss_mask": np.zeros(self.seq_len, np.float32)}

    def _concat_row(self, i: int) -> Row:
        row, lo = self.empty_row(), i * self.seq_len
        n, starts = min(len(self.tokens) - lo, self.seq_len), self.doc_starts
        first, last = np.searchsorted(starts, (lo + 1, lo + n))  # the starts inside, not at lo
        self._put(row, 0, lo, n, starts[first:last] - lo)
        return row

    def _fit_row(self, i: int) -> Row:
        row, at = self.empty_row(), 0
        for start, n in self._pieces[self._row_pieces[i] : self._row_pieces[i + 1]]:
            self._put(row, at, start, n, np.zeros(0, np.int64))
            if self.document_mask:
                row["segments"][at : at + n] = row["segments"][at - 1] + 1 if at else 1
            else:
                row["positions"][at : at + n] += at
            at += n
        return row

    def _put(self, row: Row, at: int, lo: int, n: int, starts: np.ndarray) -> None:
        """Write the n tokens from ``lo`` on at place ``at``."""
        here, targets = slice(at, at + n), self.tokens[lo + 1 : lo + n + 1]
        row["tokens"][here] = self.tokens[lo : lo + n]
        row["targets"][here] = self.bos  # the end of the last document; all others follow
        row["targets"][at : at + len(targets)] = targets
        row["loss_mask"][here] = 1
        row["positions"][here] = np.arange(n)
        row["segments"][here] = 1
        if self.document_mask:
            for start, stop in zip(starts, [*starts[1:], n]):
                row["positions"][start:stop] = np.arange(stop - start)
            row["segments"][starts] += 1  # 1 within a document, 2 where one starts
            row["segments"][here] = np.cumsum(row["segments"][here] - 1) + 1

    def _fit(self) -> tuple[np.ndarray, np.ndarray]:
        """Pieces [:, (start, length)] in row order, and where the pieces of each row begin."""
        T = self.seq_len
        sizes = np.diff(np.append(self.doc_starts, len(self.tokens)))
        counts = -(-sizes // T)
        doc = np.repeat(np.arange(len(sizes)), counts)
        within = np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.minimum(sizes[doc] - within * T, T)
        pieces = np.stack([self.doc_starts[doc] + within * T, sizes], axis=1)
        rows = first_fit_decreasing(pieces[:, 1], T)
        order = np.argsort(rows, kind="stable")
        return pieces[order], np.searchsorted(rows[order], np.arange(rows.max() + 2))


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece: the longest pieces first, each into the first row with room for it.

    Pieces of one length are placed together: they fill the rows with room from the first on.
    """
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    room, ids, total, at = np.zeros(0, np.int64), np.zeros(0, np.int64), 0, 0
    for length, count in zip(values[::-1], counts[::-1]):
        new = -(-max(0, count - int((room // length).sum())) // (capacity // length))
        room = np.append(room, np.full(new, capacity))
        ids, total = np.append(ids, np.arange(total, total + new)), total + new
        fits = room // length
        taken = np.clip(count - (np.cumsum(fits) - fits), 0, fits)
        rows[order[at : at + count]] = np.repeat(ids, taken)
        at, room = at + count, room - taken * length
        room, ids = room[room >= values[0]], ids[room >= values[0]]
    return rows


def check_packing(packing: str) -> None:
    """ConfigError unless ``packing`` is one of ``PACKINGS``."""
    if packing not in PACKINGS:
        raise ConfigError(f"packing = {packing!r}", f"must be one of {PACKINGS}", 'use "concat"')
