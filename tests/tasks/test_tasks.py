"""Generated tasks: solvable, deterministic, distributed as published, at chance when guessed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import tasks
from attnlab.core.errors import ConfigError
from attnlab.tasks import NONE

# Tasks as their names make them, and forms that the defaults do not reach.
FORMS = {name: (name, {}) for name in tasks.TASKS} | {
    "mqar random filler": ("mqar", dict(random_filler=True, length=40, pairs=5, vocab=40)),
    "mqar full": ("mqar", dict(length=32, pairs=8)),
    "compositional odd": ("mqar-compositional", dict(length=67, pairs=4, vocab=32)),
    "forgetting all": ("mqar-forgetting", dict(rebound=8, length=80)),
    "needle repeated": ("needle", dict(haystack="repeat", width=3, length=60, depths=1)),
    "needle records": ("needle", dict(haystack="records", length=100, depths=40)),
    "needle full": ("needle", dict(length=6, depths=3)),
    "needle of all": (
        "needle", dict(records=5, queries=3, values=2, width=2, haystack="records", length=120)
    ),
    "variables of chains": ("variables", dict(chains=4, hops=2, length=41)),
    "one variable": ("variables", dict(hops=0, length=5)),
    "parity at the end": ("parity", dict(last=True, length=9)),
    "common, with a rest": ("common-words", dict(length=40, common=3, often=7, rare=5)),
    "bigram of others": ("bigram-backcopy", dict(vocab=8, triggers=2, concentration=2.0, table=1)),
}


@functools.cache
def made(form: str):
    task = tasks.get(FORMS[form][0], **FORMS[form][1])
    return task, jax.jit(task.sample, static_argnums=1)


def drawn(form: str, rows: int = 300, seed: int = 0):
    task, sample = made(form)
    return task, jax.tree.map(np.asarray, sample(jax.random.key(seed), rows))


@pytest.mark.parametrize("form", FORMS)
def test_solved_by_search(form):
    """The answer at a position follows from the tokens up to it."""
    task, batch = drawn(form, 40)
    for tokens, labels, scored in zip(batch.tokens, batch.labels, batch.scored):
        assert (labels[scored] != NONE).all()
        assert (task.answers(tokens)[scored] == labels[scored]).all()
        for t in np.flatnonzero(scored):
            assert task.answers(tokens[: t + 1])[t] == labels[t]
    said = np.stack([task.answers(tokens) for tokens in batch.tokens])
    assert tasks.accuracy(batch, said) == 1.0


@pytest.mark.parametrize("form", FORMS)
def test_rows(form):
    """Shapes, ranges; a row follows from its key, others from others."""
    task, batch = drawn(form)
    assert batch.tokens.shape == batch.labels.shape == batch.scored.shape == (300, task.seq_len)
    assert batch.tokens.dtype == batch.labels.dtype == np.int32
    assert batch.tokens.min() >= 0 and batch.tokens.max() < task.vocab_size
    asked = batch.labels != NONE
    assert batch.labels[asked].min() >= 0 and batch.labels[asked].max() < task.vocab_size
    assert not (batch.scored & ~asked).any()
    (key,) = jax.random.split(jax.random.key(0), 300)[7:8]
    alone = jax.jit(task.draw)(key)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(alone), strict=True):
        assert (a[7] == np.asarray(b)).all()
    others = drawn(form, seed=1)[1].tokens
    assert (others != batch.tokens).any(1).mean() > 0.9


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name != "bigram-backcopy"])
def test_chance(name):
    """Every answer of the task comes up, so an even guess is right that often."""
    task, batch = drawn(name, 2000)
    answers = np.unique(batch.labels[batch.scored])
    assert len(answers) == round(1 / task.chance)
    guesses = np.random.default_rng(0).choice(answers, batch.labels.shape)
    right = tasks.accuracy(batch, guesses)
    asked = batch.scored.sum()
    assert abs(right - task.chance) < 4 * np.sqrt(task.chance * (1 - task.chance) / asked)


def test_plateau_of_mqar():
    """Who knows the values but not whose they are is right one time in ``pairs``."""
    task, batch = drawn("mqar")
    values = batch.tokens[:, 1 : 2 * task.pairs : 2]
    at = np.random.default_rng(0).integers(task.pairs, size=batch.labels.shape)
    right = tasks.accuracy(batch, np.take_along_axis(values, at, 1))
    assert task.plateau == 1 / 8 and abs(right - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / (8 * 300))


def test_slots_of_mqar():
    """Slot x is chosen with a weight of x^(alpha - 1); labels stand at queries alone."""
    task = tasks.get("mqar", length=42, pairs=1, alpha=0.3)
    sample = jax.jit(task.sample, static_argnums=1)
    batch = jax.tree.map(np.asarray, sample(jax.random.key(3), 20000))
    assert ((batch.labels != NONE).sum(1) == 1).all()
    at = (batch.labels != NONE).argmax(1)
    assert (at % 2 == 0).all() and (batch.tokens[:, 2:] != 0).sum(1).max() == 1
    slot = (at - 2) // 2
    weight = np.arange(1, 21) ** -0.7
    expected = weight / weight.sum() * 20000
    found = np.bincount(slot, minlength=20)
    assert (np.abs(found - expected) < 4 * np.sqrt(expected)).all()


def test_keys_and_values_of_mqar():
    _, batch = drawn("mqar random filler")
    names, values = batch.tokens[:, :10:2], batch.tokens[:, 1:10:2]
    assert all(len(set(row)) == 5 for row in (*names.tolist(), *values.tolist()))
    assert names.min() >= 1 and names.max() < 20 <= values.min() and values.max() < 40
    for tokens, labels in zip(batch.tokens, batch.labels):
        rest = tokens[10:][labels[10:] == NONE]
        assert not np.isin(rest, tokens[:10]).any() and len(np.unique(rest)) > 5


def test_forgetting_asks_for_the_last_value():
    _, batch = drawn("mqar-forgetting")
    kept = []
    for tokens, labels in zip(batch.tokens, batch.labels):
        first = dict(zip(tokens[:16:2].tolist(), tokens[1:16:2].tolist()))
        asked = labels != NONE
        kept.append(np.mean([first[t] == v for t, v in zip(tokens[asked], labels[asked])]))
    assert np.allclose(kept, 6 / 8), "two of eight keys have another value"


def test_neither_half_of_a_composed_key_suffices():
    _, batch = drawn("mqar-compositional")
    for tokens in batch.tokens[:50]:
        a, b, v = tokens[:27].reshape(9, 3).T
        assert len(set(a)) == len(set(b)) == 3 and len(set(zip(a, b))) == len(set(v)) == 9


def test_places_of_selective_copying():
    """Every set of places is as likely: each cell holds data in 8 of 56 rows."""
    _, batch = drawn("selective-copying", 2000)
    held = (batch.tokens[:, :56] != 0).mean(0)
    assert np.abs(held - 8 / 56).max() < 4 * np.sqrt(8 / 56 * 48 / 56 / 2000)
    assert ((batch.tokens == 15).sum(1) == 8).all() and (batch.tokens[:, 56:] == 15).all()


@pytest.mark.parametrize("form", [
    "needle", "needle-multivalue", "needle records", "needle repeated",
])
def test_depth_of_needles(form):
    """The first asked record stands at its depth; hidden are as many records as said."""
    task, batch = drawn(form)
    size, slots = 2 + task.width, (task.length - task._question) // (2 + task.width)
    begin = task.length - task._question
    assert set(batch.groups["depth"]) == set(range(task.depths))
    for tokens, depth in zip(batch.tokens, batch.groups["depth"]):
        marks = np.flatnonzero(tokens[:begin] == 0)
        hidden = slots if task.haystack == "records" else (
            task.records - task.queries + task.queries * task.values
        )
        assert len(marks) == hidden and (marks % size == 0).all() and tokens[begin] == 1
        mine = marks[tokens[marks + 1] == tokens[begin + 1]] // size
        assert len(mine) == task.values
        assert round(depth * (slots - 1) / max(1, task.depths - 1) + 1e-9) in mine


def test_haystacks():
    _, zipf = drawn("needle", 300)
    counts = np.bincount(zipf.tokens[zipf.tokens >= 2], minlength=66)[2:66].astype(float)
    assert 1.8 < counts[0] / counts[1] < 2.2 and 8 < counts[0] / counts[9] < 12
    _, repeated = drawn("needle repeated")
    assert set(np.unique(repeated.tokens[(repeated.tokens >= 2) & (repeated.tokens < 66)])) == set(
        range(2, 7)
    )


def test_bigrams():
    """What follows a token that is no trigger comes from its row of the table."""
    task, batch = drawn("bigram of others", 3000)
    tokens, following = batch.tokens, batch.labels
    table = task.probabilities()
    assert np.allclose(table.sum(1), 1, atol=1e-6) and (table[:, 0] == 0).all()
    for token in range(3, 8):
        after = following[:, 1:][tokens[:, 1:] == token]
        expected = table[token] * len(after)
        found = np.bincount(after, minlength=8)
        assert (np.abs(found - expected) < 5 * np.sqrt(expected + 1)).all()
    assert batch.scored[:, 1:].mean() > 0.05


def test_counting():
    _, batch = drawn("majority")
    ones = np.cumsum(batch.tokens, 1)
    assert ((batch.labels == NONE) == (2 * ones == np.arange(1, 65))).all()
    _, batch = drawn("common-words")
    for tokens in batch.tokens[:20]:
        counts = np.bincount(tokens[: np.flatnonzero(tokens == 1)[0]])
        assert sorted(set(counts[2:])) == [0, 2, 16] and (counts == 16).sum() == 4


@pytest.mark.parametrize("name, fields, message", [
    ("mqr", {}, "task = 'mqr': is not known. Fix: use mqar"),
    ("mqar", dict(pair=3), "mqar.pair: is not a field. Fix: use pairs"),
    ("mqar", dict(pairs=17), "length = 64: does not hold 17 records and 17 queries of 2 tokens"),
    ("mqar", dict(pairs=0), "pairs = 0: must be at least 1"),
    ("mqar", dict(length=63), "length = 63: must be even"),
    ("mqar", dict(vocab=16), "vocab = 16: has fewer than 8 names and 8 values"),
    ("mqar", dict(alpha=0.0), "alpha = 0.0: must be positive"),
    ("mqar-forgetting", dict(rebound=9), "rebound = 9: must be from 0 to pairs = 8"),
    ("mqar-forgetting", dict(pairs=16), "does not hold 18 records and 16 queries"),
    ("mqar-compositional", dict(pairs=8), "pairs = 8: must be a square. Fix: use 4 or 9"),
    ("mqar-compositional", dict(vocab=12, pairs=9), "vocab = 12: has"),
    ("induction", dict(length=2), "length = 2: must be at least 3"),
    ("copying", dict(data=0), "data = 0: must be at least 1"),
    ("copying", dict(alphabet=3), "alphabet = 3: must be at least 4"),
    ("needle", dict(length=4), "length = 4: has room for 0 records of 3 tokens"),
    ("needle", dict(queries=2), "queries = 2: asks for more keys than records = 1"),
    ("needle", dict(records=65), "keys = 64: there are 65 different keys"),
    ("needle", dict(haystack="records", keys=8), "keys = 8: there are 84 different keys"),
    ("needle", dict(width=0), "width = 0: must be at least 1"),
    ("variables", dict(length=20), "length = 20: has room for 4 assignments, there are 5"),
    ("variables", dict(chains=14), "variables = 64: a row has 70"),
    ("common-words", dict(rare=16), "rare = 16: must be between 0 and often = 16"),
    ("common-words", dict(words=90), "words = 90: a row has 98"),
    ("common-words", dict(length=60), "length = 60: does not hold 4 words 16 times"),
    ("parity", dict(length=0), "length = 0: must be at least 1"),
    ("bigram-backcopy", dict(triggers=62), "triggers = 62: must leave two other tokens"),
])
def test_wrong_fields(name, fields, message):
    with pytest.raises(ConfigError) as error:
        tasks.get(name, **fields)
    assert message in str(error.value)


def test_rows_can_be_drawn_inside_a_step():
    """Traced, under vmap over seeds, in a scan: nothing is drawn on the host."""
    task = tasks.get("mqar")

    @jax.jit
    def steps(keys):
        def step(total, key):
            batch = task.sample(key, 2)
            return total + (batch.labels != NONE).sum(), None

        return jax.vmap(lambda keys: jax.lax.scan(step, jnp.int32(0), keys)[0])(keys)

    keys = jax.random.split(jax.random.key(0), (3, 5))
    assert (np.asarray(steps(keys)) == 5 * 2 * 8).all()
