"""Evaluation tasks whose rows are generated on the device.

    from attnlab import tasks
    task = tasks.get("mqar", pairs=16, length=128)
    batch = task.sample(jax.random.key(0), 64)
    tasks.accuracy(batch, said)

``TASKS`` names them. ``attnlab list`` prints the table.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from attnlab.core.errors import ConfigError
from attnlab.tasks.bigram import BigramBackcopy
from attnlab.tasks.copying import Copying, Majority, Parity, SelectiveCopying
from attnlab.tasks.needle import CommonWords, Needle, VariableTracking
from attnlab.tasks.recall import MQAR, CompositionalMQAR, ForgettingMQAR, InductionHeads
from attnlab.tasks.task import NONE, Batch, Task, accuracy

__all__ = ["NONE", "TASKS", "Batch", "Task", "accuracy", "get"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A named task: its class, the fields that make it what its name says, and what it shows."""

    kind: type[Task]
    fields: Mapping[str, Any]
    shows: str


TASKS: Mapping[str, Row] = {
    "mqar": Row(MQAR, {}, "recall of many keys: size of the state"),
    "mqar-forgetting": Row(ForgettingMQAR, {}, "recall where keys get new values: overwriting"),
    "mqar-compositional": Row(CompositionalMQAR, {}, "recall of keys of two tokens: binding"),
    "induction": Row(InductionHeads, {}, "what followed a token: a shift inside the mixer"),
    "copying": Row(Copying, {}, "storing in order"),
    "selective-copying": Row(SelectiveCopying, {}, "telling data from noise, counting"),
    "needle": Row(Needle, {}, "one record in a haystack: reach, by depth"),
    "needle-multikey": Row(Needle, {"records": 4}, "a record among others: selection"),
    "needle-multivalue": Row(
        Needle, {"records": 2, "values": 4}, "all records of a key: selection of many"
    ),
    "needle-multiquery": Row(Needle, {"records": 4, "queries": 4}, "several records asked"),
    "variables": Row(VariableTracking, {}, "chains of assignments: several hops"),
    "common-words": Row(CommonWords, {}, "counting of words: aggregation"),
    "parity": Row(Parity, {}, "a state that flips: negative eigenvalues"),
    "majority": Row(Majority, {}, "even attention"),
    "bigram-backcopy": Row(BigramBackcopy, {}, "attention sinks"),
}


def get(name: str, **fields: Any) -> Task:
    """The task of that name, with these fields changed.

    Raises:
        ConfigError: no such task or field, or fields that do not go together.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS) or list(TASKS)
        raise ConfigError(f"task = {name!r}", "is not known", f"use {' or '.join(near)}")
    found = TASKS[name]
    known = [field.name for field in dataclasses.fields(found.kind)]
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known) or known
            raise ConfigError(f"{name}.{field}", "is not a field", f"use {' or '.join(near)}")
    return found.kind(**{**found.fields, **fields})
