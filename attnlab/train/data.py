"""From a corpus to batches: packed rows, a resumable shuffled loader, an evaluation pass.

A batch is a dict of NumPy arrays [B, T]: ``tokens, targets, positions, segments`` int32 and
``loss_mask`` float32. Segment 0 is padding. Every token that is not BOS is a target with loss
exactly once an epoch. The batch of step t is a function of the rows, the seed and t alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnlab.core.errors import ConfigError, DataError
from attnlab.data.corpus import Document, check_token_dtype
from attnlab.data.tokenizer import CHUNK, Tokenizer, encode_documents, storage_dtype, text_bytes

PACKINGS = ("concat", "fit")
Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads.

    Args:
        data, val_data, text_field, token_dtype: as in ``load_corpus``. tokenizer, bos_token: as in
            ``load_tokenizer``. packing, document_mask: as in ``PackedRows``. seed: of the shuffle.
    """

    data: tuple[str, ...] = ("stdlib",)
    val_data: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    bos_token: str | None = None
    text_field: str = "text"
    token_dtype: str | None = None
    packing: str = "concat"
    document_mask: bool = True
    seed: int = 0

    def __post_init__(self):
        for field in ("data", "val_data"):
            value = getattr(self, field)
            if isinstance(value, str) or not all(isinstance(v, str) and v for v in value):
                rule = "must be a tuple of paths or corpus words"
                raise ConfigError(f"{field} = {value!r}", rule, f'write {field} = ("stdlib",)')
            object.__setattr__(self, field, tuple(value))
        if not self.data:
            raise ConfigError("data = ()", "must name something to read", 'use ("stdlib",)')
        for field in ("tokenizer", "text_field"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                what = f"{field} = {getattr(self, field)!r}"
                default = type(self).__dataclass_fields__[field].default
                raise ConfigError(what, "must be a non-empty string", f'use "{default}"')
        if self.tokenizer == "bytes" and self.bos_token is not None:
            what = f"bos_token = {self.bos_token!r} with tokenizer = 'bytes'"
            raise ConfigError(what, "bytes have their own BOS, id 256", "leave bos_token out")
        if not isinstance(self.document_mask, bool):
            what = f"document_mask = {self.document_mask!r}"
            raise ConfigError(what, "must be True or False", "use True")
        if self.token_dtype is not None:
            try:
                check_token_dtype(self.token_dtype)
            except DataError as e:
                raise ConfigError(e.what, e.rule, e.fix) from None
        _check_packing(self.packing)
        _check_seed(self.seed)


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
        _check_packing(packing)
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
            self._len = -(-(len(tokens) - 1) // seq_len)

    def __len__(self) -> int:
        return self._len

    def __repr__(self) -> str:
        size = f"{len(self)} rows of {self.seq_len}, {len(self.tokens)} tokens"
        return f"PackedRows({size}, {len(self.doc_starts)} documents, {self.packing})"

    @property
    def num_targets(self) -> int:
        """Tokens with loss in one epoch: all but BOS."""
        return len(self.tokens) - len(self.doc_starts)

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per predicted token; None for token arrays whose text is unknown."""
        return None if self.text_bytes is None else self.text_bytes / self.num_targets

    @property
    def fill(self) -> float:
        """Share of the row places that hold tokens rather than padding."""
        places = len(self) * self.seq_len
        if self.packing == "concat":
            return min(len(self.tokens), places) / places
        return float(self._pieces[:, 1].sum()) / places

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
        window = self.tokens[lo : lo + self.seq_len + 1]
        n = min(len(window), self.seq_len)
        starts = self.doc_starts
        first, last = np.searchsorted(starts, (lo + 1, lo + n))  # the starts inside, not at lo
        self._put(row, 0, window, n, starts[first:last] - lo)
        return row

    def _fit_row(self, i: int) -> Row:
        row, at = self.empty_row(), 0
        for start, n in self._pieces[self._row_pieces[i] : self._row_pieces[i + 1]]:
            window = self.tokens[start : start + n + 1]
            self._put(row, at, window, n, np.zeros(0, np.int64))
            if self.document_mask:
                row["segments"][at : at + n] = row["segments"][at - 1] + 1 if at else 1
            else:
                row["positions"][at : at + n] += at
            at += n
        return row

    def _put(self, row: Row, at: int, window: np.ndarray, n: int, starts: np.ndarray) -> None:
        """Write n tokens from ``at`` on; ``window`` ends with the last target."""
        here, targets = slice(at, at + n), window[1 : n + 1]
        row["tokens"][here] = window[:n]
        row["targets"][at : at + len(targets)] = targets
        row["loss_mask"][at : at + len(targets)] = targets != self.bos
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
        inputs = np.maximum(sizes - 1, 1)  # the last token is a target only; BOS alone stays
        counts = -(-inputs // T)
        doc = np.repeat(np.arange(len(sizes)), counts)
        within = np.arange(len(doc)) - np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.minimum(inputs[doc] - within * T, T)
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


def build_rows(
    docs: Sequence[Document],
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    packing: str = "concat",
    document_mask: bool = True,
    batch: int = 1,
) -> PackedRows:
    """Tokenise one split of a corpus and pack it.

    A single token array that starts with BOS stays where it is (memory-mapped); all else is held
    in memory as uint16 or int32. DataError if an epoch has fewer rows than ``batch``.
    """
    parts = list(encode_documents(docs, tokenizer))
    if not parts:
        raise DataError("this split", "holds no document", "name more files, or val_data")
    tokens = parts[0]
    if len(parts) > 1 or tokens is not docs[0].tokens:
        tokens = np.empty(sum(map(len, parts)), storage_dtype(tokenizer.vocab_size))
        np.concatenate(parts, out=tokens, casting="unsafe")
    starts = [
        np.flatnonzero(tokens[at : at + CHUNK] == tokenizer.bos) + at
        for at in range(0, len(tokens), CHUNK)
    ]
    starts, size = np.concatenate(starts), text_bytes(docs)
    rows = PackedRows(
        tokens, starts, seq_len, tokenizer.bos, packing, document_mask, text_bytes=size
    )
    _check_enough(rows, batch)
    return rows


class Loader:
    """Endless batches of the local shard, dict of [B / shard_count, T]; see ``make_loader``."""

    def __init__(self, dataset: Any, start_step: int, threads: int):
        self._dataset, self._threads = dataset, threads
        self.set_state({"step": start_step})

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Row:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """``{"step": k}``: k batches were taken; the same on every shard."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with the batch of step ``state["step"]``."""
        import grain

        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            rule = "must be a step count >= 0"
            raise DataError(f"loader state {state!r}", rule, 'pass {"step": k} from get_state')
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=16)
        self._iterator = iter(self._dataset.to_iter_dataset(options))
        self._iterator.set_state({"next_index": step})
        self._step = step


def make_loader(
    rows: PackedRows,
    *,
    batch: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    start_step: int = 0,
    shuffle: bool = True,
    threads: int = 1,
) -> Loader:
    """Endless epochs over ``rows``, each in its own order.

    The global order is made first and then dealt out: step t holds the same B rows for every
    ``shard_count``, shard s those at places s, s + shard_count, ... A batch may cross the border
    of two epochs.

    Args:
        batch: B over all shards, a multiple of ``shard_count``. seed: of the shuffle.
        shard_index, shard_count: distinct batch slices, not processes. threads: that read ahead.
    """
    import grain

    _check_shards(batch, shard_index, shard_count)
    _check_seed(seed)
    _check_enough(rows, batch)
    dataset = grain.MapDataset.source(rows)
    if shuffle:
        dataset = dataset.shuffle(seed=seed)
    dataset = dataset.repeat()[shard_index::shard_count].batch(batch // shard_count)
    return Loader(dataset, start_step, threads)


def eval_batches(
    rows: PackedRows,
    batch: int,
    shard_index: int = 0,
    shard_count: int = 1,
    max_batches: int | None = None,
) -> Iterator[Row]:
    """Each row once, in order, dict of [B / shard_count, T]; the last batch is filled with padding.

    ``max_batches`` stops early. Shards take rows as in ``make_loader``.
    """
    _check_shards(batch, shard_index, shard_count)
    count = -(-len(rows) // batch)
    for t in range(count if max_batches is None else min(count, max_batches)):
        places = range(t * batch + shard_index, (t + 1) * batch, shard_count)
        local = [rows[i] if i < len(rows) else rows.empty_row() for i in places]
        yield {key: np.stack([row[key] for row in local]) for key in local[0]}


def _check_enough(rows: PackedRows, batch: int) -> None:
    if len(rows) < batch:
        what = f"{len(rows.tokens)} tokens"
        rule = f"make {len(rows)} rows of seq_len = {rows.seq_len}, one batch takes {batch}"
        raise DataError(what, rule, f"use batch <= {len(rows)}, a shorter seq_len or more text")


def _check_shards(batch: int, shard_index: int, shard_count: int) -> None:
    if not 0 <= shard_index < shard_count:
        what = f"shard_index = {shard_index}, shard_count = {shard_count}"
        raise ConfigError(what, "needs 0 <= shard_index < shard_count", "use 0 and 1")
    if batch < 1 or batch % shard_count:
        rule = f"must be a positive multiple of shard_count = {shard_count}"
        fix = f"use batch = {max(1, batch // shard_count) * shard_count}"
        raise ConfigError(f"batch = {batch}", rule, fix)


def _check_packing(packing: str) -> None:
    if packing not in PACKINGS:
        raise ConfigError(f"packing = {packing!r}", f"must be one of {PACKINGS}", 'use "concat"')


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed!r}", "must be an integer in [0, 2**32)", "use 0")
