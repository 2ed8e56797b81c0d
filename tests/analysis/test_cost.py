"""The cost of a layer: FLOPs, bytes, intensities that are known, and the command."""

from __future__ import annotations

import dataclasses
import json

import pytest

from attnlab import cli
from attnlab.analysis import cost, listing
from attnlab.analysis.targets import find
from attnlab.core.errors import ConfigError
from attnlab.core.registry import VARIANTS, build_config

H200 = find("h200")


def made(name, **fields):
    return listing.sized(name, precision=cost.BF16, **fields)


def decode(config, context, batch=1, tokens=1):
    return cost.parts(config, "decode", tokens=tokens, context=context, batch=batch)


@pytest.mark.parametrize("heads, kv_heads", [(16, 16), (16, 4), (16, 1)])
@pytest.mark.parametrize("context", [1024, 100_000])
@pytest.mark.parametrize("batch", [1, 64])
def test_decoding_does_g_operations_a_byte(heads, kv_heads, context, batch):
    """Of the cache, in bf16: whatever the context and the batch."""
    config = made("gqa", num_heads=heads, num_kv_heads=kv_heads)
    assert decode(config, context, batch)["attention"].intensity == heads // kv_heads


def test_known_intensities():
    """MLA absorbed, in the sizes of DeepSeek-V2: 128 (2 * 512 + 64) / (512 + 64); CCA: 2 s / b."""
    deepseek = build_config(
        "mla", dim=5120, num_heads=128, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128,
        precision=cost.BF16,
    )
    found = decode(deepseek, 10_000)["attention"]
    assert found.intensity == pytest.approx(128 * 1088 / 576) and found.bound(H200) == "compute"
    multi = made("cca", num_kv_heads=16)
    assert decode(multi, 10**6)["attention"].intensity == pytest.approx(1, rel=1e-3)


def test_weights_are_shared_by_a_batch():
    config = made("gqa")
    one, many = (decode(config, 4096, batch)["weights"] for batch in (1, 64))
    assert one.flops == 2 * config.param_count() and many.flops == 64 * one.flops
    assert one.intensity == pytest.approx(1, rel=1e-2) and many.intensity > 50
    assert decode(config, 4096, 1024)["weights"].bound(H200) == "compute"


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mode", ["train", "prefill"])
def test_sums_of_the_config(name, mode):
    config = made(name)
    found = cost.parts(config, mode, tokens=4096, context=4096, batch=2)
    passes = 3 if mode == "train" else 1
    flops = config.flops(4096, 4096, mode)
    assert found["weights"].flops == 2 * passes * flops.linear
    assert found["attention"].flops == 2 * passes * flops.visible
    assert found["attention"].bytes == 2 * passes * config.cache_bytes(4096)
    total = sum(part.seconds(H200) for part in found.values())
    assert cost.seconds(config, mode, H200, context=4096, batch=2) == total


def test_a_window_reads_what_it_shows():
    config = made("gqa", window=1000, sink_tokens=4)
    assert decode(config, 10**6)["attention"].bytes == config.cache_bytes(1004)
    assert decode(config, 500)["attention"].bytes == config.cache_bytes(500)
    assert decode(config, 10**6)["attention"].intensity == pytest.approx(4)


def test_a_mix_reads_much_and_answers_little():
    config = made("gqa")
    read = cost.seconds(config, "prefill", H200, context=4096) / 4096
    answered = cost.seconds(config, "decode", H200, context=4096)
    assert cost.seconds(config, "mix", H200, context=4096) == 176 * read + answered


def test_roofline():
    part = cost.Cost(flops=989e12, bytes=1e9)
    assert part.seconds(H200) == 1.0 and part.bound(H200) == "compute"
    assert cost.Cost(1e9, 4800e9).seconds(H200) == 1.0
    assert cost.Cost(1e9, 1e9).bound(H200) == "memory"
    assert dataclasses.astuple(part.times(2)) == (2 * 989e12, 2e9)


def test_command(capsys, tmp_path):
    assert cli.main("cost --batch 64 --contexts 1k,32k".split()) == 0
    out = capsys.readouterr().out
    assert "decode, NVIDIA H200, batch 64, bf16" in out and "32,768" in out
    assert all(name in out for name in VARIANTS)
    picture = tmp_path / "cost.png"
    command = f"cost --json --variants mla,gqa --mode mix --target v5p --plot {picture}"
    assert cli.main(command.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["variant"] for row in found} == {"mla", "gqa"} and len(found) == 16
    assert found[0]["target"] == "v5p" and picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("flags, message", [
    ("--variants gqa,mal", "variant = 'mal': is not registered. Fix: use mla"),
    ("--target h300", "--target h300: is not known. Fix: use h200 or h100"),
    ("--contexts 4k,x", "--contexts 4k,x: 'x' is no number of tokens"),
    ("--contexts 0", "--contexts 0: '0' is no number"),
    ("--batch 0", "--batch 0: must be at least 1"),
    ("--plot /nowhere/cost.png", "--plot /nowhere/cost.png: cannot be written"),
])
def test_wrong_flags(flags, message, capsys):
    assert cli.main(["cost", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_tokens_are_part_of_the_context():
    with pytest.raises(ConfigError, match="tokens = 5 with context = 4: the context includes"):
        decode(made("gqa"), 4, tokens=5)
