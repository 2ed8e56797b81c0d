"""Block sizes: forced, tuned for the nearest call, or the heuristic; wrong ones are named."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import attnlab
from attnlab.analysis import tpu_model
from attnlab.core.dispatch import Device, compiling_for
from attnlab.core.errors import ConfigError
from attnlab.core.mask import Causal, Full, Segments, SinkTokens, Window
from attnlab.ops.attention import attention, tuning

DEVICE = Device("tpu", "TPU test")
KEY = tuning.Key("splash", "forward", 128, 128, 4, "bfloat16", 4096, 4096, "causal")
ROW = {
    **dataclasses.asdict(KEY), "ms": 1.0, "basis": "predicted", "date": "2026-01-01",
    "versions": {}, "blocks": {"block_q": 1024, "block_kv": 1024, "block_kv_compute": 512},
}


@pytest.fixture
def rows(monkeypatch):
    """A tuned table made of these rows."""
    return lambda *found: monkeypatch.setattr(tuning, "table", lambda kind: found)


def test_heuristic_without_a_table():
    choice = tuning.choose(KEY, DEVICE)
    assert choice.source == "default" and set(choice.blocks.values()) == {512}
    short = tuning.choose(dataclasses.replace(KEY, T=384, S=384), DEVICE)
    assert set(short.blocks.values()) == {128}


def test_nearest_row_that_fits(rows):
    far = ROW | {"T": 65536, "S": 65536, "blocks": dict.fromkeys(ROW["blocks"], 2048)}
    rows(far, ROW)
    assert tuning.choose(KEY, DEVICE).blocks == ROW["blocks"]
    assert tuning.choose(KEY, DEVICE).source == "tuned (predicted 2026-01-01)"
    longer = dataclasses.replace(KEY, T=2**15, S=2**15)
    assert tuning.choose(longer, DEVICE).blocks["block_q"] == 2048
    odd = dataclasses.replace(KEY, T=4096 + 512, S=4096 + 512)  # 1024 does not divide it
    assert tuning.choose(odd, DEVICE).source == "default"
    short = {"T": 128, "S": 128}
    for change in ({"H": 64}, {"dtype": "float32"}, {"direction": "backward"}, short):
        assert tuning.choose(dataclasses.replace(KEY, **change), DEVICE).source == "default"
    masked = ROW | {"mask": "window", "blocks": dict.fromkeys(ROW["blocks"], 256)}
    rows(ROW, masked)
    window = dataclasses.replace(KEY, mask="window", G=8)
    assert tuning.choose(window, DEVICE).blocks == masked["blocks"]


def test_forcing(rows):
    rows(ROW)
    with tuning.forcing({"block_q": 256, "block_q_dq": 256}), tuning.recording() as seen:
        choice = tuning.choose(KEY, DEVICE)
        assert choice.blocks == ROW["blocks"] | {"block_q": 256} and choice.source == "forced"
        backward = dataclasses.replace(KEY, direction="backward")
        assert tuning.choose(backward, DEVICE).source == "forced"
    assert seen[0] == choice and len(seen) == 2
    with tuning.forcing({"block_q_dq": 256}):
        assert tuning.choose(KEY, DEVICE).source.startswith("tuned"), "nothing of this pass"
    assert tuning.choose(KEY, DEVICE).blocks == ROW["blocks"]


@pytest.mark.parametrize("blocks, message", [
    ({"block_x": 1}, "block size 'block_x': splash has no such block. Fix: use block_kv, "),
    ({"block_q": 100}, "block_q = 100 is not a multiple of 128"),
    ({"block_q": 768}, "block_q = 768 does not divide T = 4096"),
    ({"block_kv_compute": 1024}, "block_kv_compute = 1024 does not divide a block of 512"),
    ({"block_q": 0}, "block_q = 0 is not a multiple of 128"),
])
def test_wrong_sizes(blocks, message):
    with tuning.forcing(blocks), pytest.raises(ConfigError, match=message):
        tuning.choose(KEY, DEVICE)


def test_unknown_implementation():
    with pytest.raises(ConfigError, match="has no block sizes to choose"):
        tuning.choose(dataclasses.replace(KEY, implementation="xla"), DEVICE)


@pytest.mark.parametrize("mask, name", [
    (Full(), "full"), (Causal() & Segments(), "causal"), (Causal() & Window(8), "window"),
    (Causal() & (Window(8) | SinkTokens(1)), "other"),
])
def test_mask_classes(mask, name):
    assert tuning.mask_class(mask) == name


@pytest.mark.parametrize("direction", tuning.DIRECTIONS)
@pytest.mark.parametrize("T", [128, 1024, 1536, 8192])
@pytest.mark.parametrize("name", list(tuning.SPACES))
def test_spaces(name, T, direction):
    """Heuristic and candidates fit the call they are for, and tell their tiles."""
    space = tuning.space(name)
    key = dataclasses.replace(KEY, implementation=name, direction=direction, T=T, S=T)
    found = space.candidates(key)
    assert space.default(key) in found and len(found) == len({str(blocks) for blocks in found})
    for blocks in found:
        assert space.refuses(key, blocks) is None, blocks
        for role in ("forward",) if direction == "forward" else ("dq", "dkv"):
            tile = space.tile(role, blocks)
            assert T % tile.q == T % tile.kv == 0 and tile.heads >= 1


def test_splash_takes_them():
    """The kernel is really built with the forced sizes: its grid says so."""
    x = jnp.zeros((1, 1024, 2, 64), jnp.bfloat16)
    with compiling_for(DEVICE), tuning.forcing({"block_q": 256, "block_kv": 512}):
        jaxpr = jax.make_jaxpr(lambda x: attention(x, x, x, impl="splash"))(x)
    (launch,) = tpu_model.launches(jaxpr.jaxpr)
    assert launch.steps == 2 * (1024 // 256) * (1024 // 512) and launch.role == "forward"


def test_shipped_tables_are_sound():
    """Every row of every table names its basis, fits its own call, and is reached by it."""
    for file in pathlib.Path(attnlab.__file__).parent.glob("data/tuned/*.json"):
        found = json.loads(file.read_text())
        assert file.name == f"{tuning.slug(found['device'])}.json"
        for row in found["rows"]:
            key = tuning.row_key(row)
            assert key == key.bucket() and row["basis"] in ("predicted", "measured")
            assert row["versions"] and row["date"] and row["ms"] > 0
            assert tuning.space(key.implementation).refuses(key, row["blocks"]) is None
            device = Device("any", found["device"])
            assert tuning.choose(key, device).blocks == row["blocks"]
