"""From a corpus to batches: tokenised rows, a resumable shuffled loader, an evaluation pass.

A batch is a dict of NumPy arrays [B, T]: ``tokens, targets, positions, segments`` int32 and
``loss_mask`` float32. Segment 0 is padding. Every token predicts the next one of its document, the
last one BOS, exactly once an epoch. The batch of step t is a function of the rows, the seed and t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnlab.core.errors import ConfigError, DataError
from attnlab.data.packing import PackedRows, Row, check_packing
from attnlab.data.readers import Document, check_token_dtype
from attnlab.data.tokenizer import CHUNK, Tokenizer, encode_documents, storage_dtype, text_bytes


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
        check_packing(self.packing)
        _check_seed(self.seed)


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
    # A finite number of epochs that nobody reaches: endless ones overflow grain's length.
    dataset = dataset.repeat(2**48 // len(rows) + 1)
    dataset = dataset[shard_index::shard_count].batch(batch // shard_count)
    return Loader(dataset, start_step, threads)


def eval_batches(
    rows: PackedRows,
    batch: int,
    shard_index: int = 0,
    shard_count: int = 1,
    limit: int | None = None,
) -> Iterator[Row]:
    """Each row once, in order, dict of [B / shard_count, T]; the last batch is filled with padding.

    ``limit``: that many rows instead, spread evenly over all. Shards take rows as in
    ``make_loader``.
    """
    _check_shards(batch, shard_index, shard_count)
    chosen = _spread(len(rows), limit)
    for start in range(0, len(chosen), batch):
        places = range(start + shard_index, start + batch, shard_count)
        local = [rows[chosen[i]] if i < len(chosen) else rows.empty_row() for i in places]
        yield {key: np.stack([row[key] for row in local]) for key in local[0]}


def bytes_per_token(
    rows: PackedRows, tokenizer: Tokenizer, limit: int | None = None
) -> float | None:
    """UTF-8 bytes per target of the rows that ``eval_batches`` takes; None where unknown.

    Of chosen rows the targets are decoded; a character cut by the end of a row counts as three.
    """
    chosen = _spread(len(rows), limit)
    if len(chosen) == len(rows) or rows.text_bytes is None:
        return rows.bytes_per_token
    size = count = 0
    for i in chosen:
        targets = rows[i]["targets"][rows[i]["loss_mask"] > 0]
        text = targets[targets != tokenizer.bos]
        bytes_ = len(text) if tokenizer.name == "bytes" else len(tokenizer.decode(text).encode())
        size, count = size + bytes_, count + len(targets)
    return size / count


def _spread(count: int, limit: int | None) -> list[int]:
    """``limit`` of ``count`` places at even distances, all where there is no limit."""
    taken = count if limit is None else min(limit, count)
    return [i * count // taken for i in range(taken)]


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


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed!r}", "must be an integer in [0, 2**32)", "use 0")
