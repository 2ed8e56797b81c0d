"""Needles in a haystack of tokens, and their relatives of RULER: variables and common words."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.tasks.task import NONE, Batch, Line, distinct, require, require_positive, row

MARK, ASK = 0, 1  # the first two tokens of these vocabularies
PHRASE = 5  # tokens of the phrase that a repeated haystack consists of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Line):
    """Records ``MARK key value...`` hidden in a haystack; at the end ``ASK key`` and the value.

    The forms of RULER (Hsieh et al. 2024, arXiv 2404.06654) over tokens: with one record a single
    needle; ``records`` > 1: other keys distract; ``values`` > 1: the asked key stands there so
    often, and all its values are asked, as they came; ``queries`` > 1: so many keys are asked, one
    after the other. The answer is read along: at each token of it the next one is the label.
    ``groups``: depth, from 0 (front) to ``depths - 1``, of the first asked record.

    Differs from RULER: values are ``width`` tokens, the score is the part of right tokens, and
    answers have an order.

    Args:
        haystack: "repeat" (one phrase again and again), "zipf" (tokens with weights 1 / rank) or
            "records" (records of other keys wherever one fits).
    """

    length: int = 256
    records: int = 1
    values: int = 1
    queries: int = 1
    width: int = 1
    haystack: Literal["repeat", "zipf", "records"] = "zipf"
    depths: int = 10
    filler: int = 64
    keys: int = 64
    symbols: int = 64

    def __post_init__(self):
        require_positive(self, "records", "values", "queries", "width", "depths", "symbols")
        require(
            self.queries <= self.records, f"queries = {self.queries}",
            f"asks for more keys than records = {self.records}", "hide more or ask fewer",
        )
        require(
            self.filler >= PHRASE, f"filler = {self.filler}",
            f"has fewer tokens than the phrase of {PHRASE}", "use 64",
        )
        needed = self._hidden
        require(
            needed <= self._slots, f"length = {self.length}",
            f"has room for {max(0, self._slots)} records of {self._record} tokens before the "
            f"questions of {self._question}, {needed} are hidden", "use a longer row",
        )
        kinds = self._slots - self.queries * self.values if self.haystack == "records" else 0
        most = max(self.records, kinds + self.queries)
        require(
            most <= self.keys, f"keys = {self.keys}", f"there are {most} different keys in a row",
            f"use keys = {most}",
        )

    @property
    def vocab_size(self) -> int:
        return 2 + self.filler + self.keys + self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def _record(self) -> int:
        return 2 + self.width

    @property
    def _hidden(self) -> int:
        return self.records - self.queries + self.queries * self.values

    @property
    def _question(self) -> int:
        # The last token of the last answer is a label alone.
        return self.queries * (2 + self.values * self.width) - 1

    @property
    def _slots(self) -> int:
        return (self.length - self._question) // self._record

    def group_size(self, name: str) -> int:
        return self.depths if name == "depth" else super().group_size(name)

    def draw(self, key: jax.Array) -> Batch:
        hay, names, values, depth, others = jax.random.split(key, 5)
        asked, slots = self.queries * self.values, self._slots
        total = slots if self.haystack == "records" else self._hidden
        names = 2 + self.filler + jax.random.choice(
            names, self.keys, (self.queries + total - asked,), replace=False
        )
        first = 2 + self.filler + self.keys
        values = jax.random.randint(values, (total, self.width), first, first + self.symbols)
        # The first asked record has its depth; the rest are anywhere else.
        depth = jax.random.randint(depth, (), 0, self.depths)
        place = jnp.round(depth * (slots - 1) / max(1, self.depths - 1)).astype(jnp.int32)
        rest = jax.random.permutation(others, slots - 1)[: total - 1]
        at = jnp.concatenate([place[None], jnp.where(rest >= place, rest + 1, rest)])
        whose = jnp.concatenate([
            jnp.repeat(names[: self.queries], self.values), names[self.queries :]
        ])
        records = jnp.concatenate(
            [jnp.full((total, 1), MARK), whose[:, None], values], 1
        )
        cells = self._record * at[:, None] + jnp.arange(self._record)
        tokens = self._hay(hay).at[cells].set(records)
        # Values of one key in the order in which they stand.
        order = jnp.argsort(at[:asked].reshape(self.queries, self.values), 1)
        answers = jnp.take_along_axis(
            values[:asked].reshape(self.queries, self.values, self.width), order[..., None], 1
        ).reshape(self.queries, -1)
        question = jnp.concatenate([
            jnp.full((self.queries, 1), ASK), names[: self.queries, None], answers
        ], 1)
        labels = jnp.concatenate([
            jnp.full((self.queries, 1), NONE), answers, jnp.full((self.queries, 1), NONE)
        ], 1)
        begin = self.length - self._question
        tokens = tokens.at[begin:].set(question.ravel()[:-1])
        labels = jnp.full(self.length, NONE).at[begin:].set(labels.ravel()[:-1])
        return row(tokens, labels, depth=depth)

    def _hay(self, key: jax.Array) -> jax.Array:
        if self.haystack == "zipf":
            weights = 1 / jnp.arange(1, self.filler + 1)
            drawn = jax.random.categorical(key, jnp.log(weights), shape=(self.length,))
        else:
            drawn = jnp.arange(self.length) % PHRASE
        return 2 + drawn

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        found: dict[int, list[int]] = {}
        said, at, line = [NONE] * len(tokens), 0, tokens.tolist()
        while at < len(line):
            if line[at] == MARK:
                found.setdefault(line[at + 1], []).extend(line[at + 2 : at + self._record])
                at += self._record
            elif line[at] == ASK:
                answer = found[line[at + 1]]
                for i, value in enumerate(answer):
                    if at + 1 + i < len(line):
                        said[at + 1 + i] = value
                at += 2 + len(answer)
            else:
                at += 1
        return np.array(said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(Line):
    """Chains ``MARK x0 c``, ``MARK x1 x0``, ... scattered in order; at the end ``ASK c``: which
    variables hold the constant, first to last? ``hops`` assignments follow the first of a chain.

    RULER (Hsieh et al. 2024, arXiv 2404.06654), over tokens.
    """

    length: int = 256
    chains: int = 1
    hops: int = 4
    filler: int = 64
    variables: int = 64
    constants: int = 64

    def __post_init__(self):
        require_positive(self, "chains")
        require(self.hops >= 0, f"hops = {self.hops}", "must not be negative", "use 4")
        needed = self.chains * (self.hops + 1)
        require(
            needed <= self._slots, f"length = {self.length}",
            f"has room for {max(0, self._slots)} assignments, there are {needed}",
            f"use length = {3 * needed + self.hops + 2}",
        )
        for name, least in (("variables", needed), ("constants", self.chains), ("filler", 1)):
            given = getattr(self, name)
            require(
                given >= least, f"{name} = {given}", f"a row has {least}", f"use {name} = {least}"
            )

    @property
    def vocab_size(self) -> int:
        return 2 + self.filler + self.variables + self.constants

    @property
    def chance(self) -> float:
        return 1 / self.variables

    @property
    def _slots(self) -> int:
        return (self.length - self.hops - 2) // 3

    def draw(self, key: jax.Array) -> Batch:
        hay, names, fixed, places, order = jax.random.split(key, 5)
        size = self.hops + 1
        first = 2 + self.filler
        names = distinct(names, self.chains * size, first, first + self.variables)
        names = names.reshape(self.chains, size)
        first += self.variables
        fixed = distinct(fixed, self.chains, first, first + self.constants)
        source = jnp.concatenate([fixed[:, None], names[:, :-1]], 1)
        # Any order of chains, each in its own order: of the sorted places a chain has a random set.
        places = jnp.sort(jax.random.choice(
            places, self._slots, (self.chains * size,), replace=False
        ))
        owner = jax.random.permutation(order, jnp.repeat(jnp.arange(self.chains), size))
        at = places[jnp.argsort(owner, stable=True)].reshape(self.chains, size)
        begin = self.length - size - 1
        tokens = 2 + jax.random.randint(hay, (self.length,), 0, self.filler)
        for cell, given in enumerate((jnp.full_like(names, MARK), names, source)):
            tokens = tokens.at[3 * at + cell].set(given)
        question = jnp.concatenate([jnp.array([ASK]), fixed[:1], names[0, :-1]])
        tokens = tokens.at[begin:].set(question)
        labels = jnp.full(self.length, NONE).at[begin + 1 :].set(names[0])
        return row(tokens, labels)

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        line, chains, at = tokens.tolist(), {}, 0
        while line[at] != ASK:
            if line[at] != MARK:
                at += 1
                continue
            _, variable, source = line[at : at + 3]
            chain = chains.setdefault(source, [])
            chain.append(variable)
            chains[variable] = chain
            at += 3
        answer = chains[line[at + 1]]
        return np.array(([NONE] * (at + 1) + answer)[: len(line)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(Line):
    """A shuffled list of words: ``common`` of them ``often`` times, others ``rare`` times; at the
    end ``ASK``: which are common, by their number?

    Aggregation, not recall. RULER (Hsieh et al. 2024, arXiv 2404.06654), over tokens; differs: the
    answer has an order.
    """

    length: int = 256
    common: int = 4
    often: int = 16
    rare: int = 2
    words: int = 128

    def __post_init__(self):
        require_positive(self, "common")
        require(
            0 < self.rare < self.often, f"rare = {self.rare}",
            f"must be between 0 and often = {self.often}", "use 2",
        )
        require(
            self._others > 0, f"length = {self.length}",
            f"does not hold {self.common} words {self.often} times and others",
            f"use length = {self.common * (self.often + 1) + self.rare}",
        )
        most = self.common + self._others
        require(
            most <= self.words, f"words = {self.words}", f"a row has {most}", f"use words = {most}"
        )

    @property
    def vocab_size(self) -> int:
        return 2 + self.words

    @property
    def chance(self) -> float:
        return 1 / self.words

    @property
    def _others(self) -> int:
        return (self.length - self.common * (self.often + 1)) // self.rare

    def draw(self, key: jax.Array) -> Batch:
        words, order = jax.random.split(key)
        words = distinct(words, self.common + self._others, 2, 2 + self.words)
        common, others = jnp.sort(words[: self.common]), words[self.common :]
        said = jnp.concatenate([jnp.repeat(common, self.often), jnp.repeat(others, self.rare)])
        said = jax.random.permutation(order, said)
        begin = self.length - self.common
        tokens = jnp.full(self.length, MARK)  # what is left between the list and the question
        tokens = tokens.at[: len(said)].set(said)
        tokens = tokens.at[begin:].set(jnp.concatenate([jnp.array([ASK]), common[:-1]]))
        return row(tokens, jnp.full(self.length, NONE).at[begin:].set(common))

    def answers(self, tokens: np.ndarray) -> np.ndarray:
        line = tokens.tolist()
        asked = line.index(ASK)
        words, counts = np.unique(line[:asked], return_counts=True)
        known = sorted(
            word for word, count in zip(words.tolist(), counts.tolist())
            if word > ASK and count >= self.often
        )
        return np.array(([NONE] * asked + known)[: len(line)])
