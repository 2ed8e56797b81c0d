"""Generation against full passes without a cache, sampling, scoring, evaluation, feeding."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from attnlab.core import registry, versions
from attnlab.core.errors import ConfigError, DataError, MeshError, NonFiniteError, ShapeError
from attnlab.core.types import Seq
from attnlab.infer import generate as infer
from attnlab.infer.evaluate import evaluate
from attnlab.infer.generate import generate, score
from attnlab.infer.sample import SampleConfig, sample
from attnlab.models.decoder import Decoder, DecoderConfig
from attnlab.parallel import feed
from attnlab.parallel.mesh import make_mesh
from attnlab.parallel.rules import RULES
from attnlab.testing.fixtures import randomise

VOCAB, NEW = 21, 7
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2], [7, 1, 8, 2]]
GREEDY = SampleConfig(temperature=0)
FIELDS = {
    "gqa": {"num_heads": 4, "num_kv_heads": 2, "window": 4, "sink_tokens": 1},
    "mla": {"num_heads": 2, "kv_rank": 6, "nope_dim": 6, "rope_dim": 4, "value_dim": 8},
    "cca": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
}
_models: dict = {}


def attention(name: str):
    """A tiny config of a variant."""
    return registry.build_config(name, dim=16, **FIELDS[name])


def decoder(name: str = "gqa", vocab: int = VOCAB) -> tuple:
    """``(graphdef, params)`` of two layers of the variant; after cca's one a plain one."""
    if (name, vocab) not in _models:
        period = (attention(name),)
        if name == "cca":  # caches of two kinds in one model
            period += (registry.build_config("gqa", dim=16, num_heads=2),)
        config = DecoderConfig(
            vocab_size=vocab, period=period, repeats=3 - len(period), mlp_dim=24
        )
        graphdef, params = versions.split_module(config.build(nnx.Rngs(0)))
        _models[name, vocab] = graphdef, randomise(params, spread=0.4)
    return _models[name, vocab]


def full_logits(model, rows, width=24):
    """Logits ``[B, width, vocab]`` of one pass without a cache, right-padded."""
    graphdef, params = model
    lengths = jnp.array([len(r) for r in rows])[:, None]
    tokens = jnp.array([r + [0] * (width - len(r)) for r in rows])
    seq = Seq.full(len(rows), width)
    seq = Seq(seq.positions, (seq.positions < lengths).astype(jnp.int32))

    @jax.jit
    def run(params):
        module = versions.merge_module(graphdef, params)
        return module.logits(module.hidden(tokens, seq)[0])

    return np.asarray(run(params))


def oracle(model, prompts, new):
    """Greedy tokens by one full pass a token."""
    graphdef, params = model
    rows, width = [list(p) for p in prompts], max(map(len, prompts)) + new

    @jax.jit
    def run(params, tokens, lengths):
        module = versions.merge_module(graphdef, params)
        seq = Seq.full(*tokens.shape)
        seq = Seq(seq.positions, (seq.positions < lengths[:, None]).astype(jnp.int32))
        h = module.hidden(tokens, seq)[0]
        return module.logits(h[jnp.arange(len(lengths)), lengths - 1]).argmax(-1)

    for _ in range(new):
        tokens = np.array([r + [0] * (width - len(r)) for r in rows], np.int32)
        drawn = np.asarray(run(params, tokens, np.array([len(r) for r in rows])))
        for row, token in zip(rows, drawn, strict=True):
            row.append(int(token))
    return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize("name", FIELDS)
def test_greedy_equals_full_passes(name):
    model = decoder(name)
    want = oracle(model, PROMPTS, NEW)
    assert len({tuple(row) for row in want}) == 3 and len({t for row in want for t in row}) > 3
    got = generate(model, PROMPTS, new_tokens=NEW, sample=GREEDY)
    assert got.tokens == want and got.finished == ["length"] * 3
    split = {"new_tokens": NEW, "sample": GREEDY, "prefill_chunk": 4, "capacity": 15}
    assert generate(model, PROMPTS, **split).tokens == want
    for prompt, row in zip(PROMPTS, want, strict=True):
        assert generate(model, [prompt], **split).tokens == [row]


def test_module_numpy_prompts_and_one_token():
    model = decoder()
    want = oracle(model, PROMPTS, 1)
    module = versions.merge_module(*model)
    prompts = [np.array(p, np.int64) for p in PROMPTS]
    assert generate(module, prompts, new_tokens=1, sample=GREEDY).tokens == want
    assert generate(model, prompts, new_tokens=1, sample=GREEDY, capacity=40).tokens == want


def test_stop_ids():
    model = decoder()
    free = generate(model, PROMPTS, new_tokens=NEW, sample=GREEDY).tokens
    # The token whose first appearance in row 0 is latest, among those missing from another row.
    missing = [t for t in free[0] if any(t not in row for row in free)]
    stop = max(missing, key=free[0].index)
    spare = next(t for t in range(VOCAB) if all(t not in row for row in free))
    got = generate(model, PROMPTS, new_tokens=NEW, sample=GREEDY, stop_ids=[stop, spare])
    ends = [row.index(stop) if stop in row else None for row in free]
    assert ends[0] is not None and None in ends
    assert got.tokens == [row[:end] for row, end in zip(free, ends, strict=True)]
    assert got.finished == ["length" if end is None else "stop" for end in ends]
    # A stop id as the very last token is a stop, and as the very first leaves nothing.
    last = generate(model, [PROMPTS[0]], new_tokens=ends[0] + 1, sample=GREEDY, stop_ids=[stop])
    assert last.finished == ["stop"] and len(last.tokens[0]) == ends[0]
    first = generate(model, [PROMPTS[0]], new_tokens=NEW, sample=GREEDY, stop_ids=[free[0][0]])
    assert first.finished == ["stop"] and first.tokens == [[]]


def test_a_stopped_row_writes_nothing():
    graphdef, params = decoder()
    static = {"graphdef": graphdef, "context": None}
    caches = infer._init(params, **static, batch=2, capacity=9, dtype=None)
    lengths = np.array([2, 3], np.int32)
    tokens = np.array([[1, 2, 0], [3, 4, 5]], np.int32)
    last = np.zeros((2, 16), np.float32)
    last, caches = infer._prefill(
        params, None, tokens, np.int32(0), lengths, last, caches, **static, impl=None
    )
    assert [c.length.tolist() for c in caches] == [[[2, 3]] * 2]
    free = generate((graphdef, params), [[1, 2], [3, 4, 5]], new_tokens=6, sample=GREEDY).tokens
    stop = free[0][1]
    drawn, _, caches = infer._decode(
        params, None, jax.random.key(0), last, lengths, np.array([stop], np.int32), caches,
        **static, impl=None, count=6, sample=GREEDY,
    )
    end = free[0].index(stop)
    assert drawn[0].tolist() == free[0][:end] + [-1] + [-2] * (5 - end)
    written = [int((row >= 0).sum()) for row in drawn]
    written = [min(n, 5) for n in written]  # the last token is never an input
    for cache in caches:
        assert cache.length.tolist() == [[2 + written[0], 3 + written[1]]] * 2
        assert ((cache.segments > 0).sum(-1) == cache.length).all()


def test_random_generation_depends_on_the_key_alone():
    model, new = decoder(), 12
    run = lambda seed: generate(  # noqa: E731
        model, PROMPTS, new_tokens=new, sample=SampleConfig(temperature=3.0, top_p=0.9),
        key=jax.random.key(seed),
    ).tokens
    assert run(0) == run(0) != run(1)


def test_no_retrace(monkeypatch):
    graphdef, params = decoder("gqa", vocab=13)
    traced, hidden = [], Decoder.hidden

    def counted(self, tokens, *args, step="train", **kwargs):
        traced.append(step)
        return hidden(self, tokens, *args, step=step, **kwargs)

    monkeypatch.setattr(Decoder, "hidden", counted)
    kw = {"new_tokens": 4, "sample": GREEDY, "prefill_chunk": 2, "capacity": 12}
    first = generate((graphdef, params), [[1, 2, 3, 4, 5], [6]], **kw)
    assert sorted(set(traced)) == ["decode", "prefill"] and traced.count("prefill") == 1
    assert traced.count("decode") == 1
    count = len(traced)
    assert generate((graphdef, params), [[1, 2, 3, 4, 5], [6]], **kw) == first
    other = jax.tree.map(lambda a: a * 1.1, params)
    generate(versions.merge_module(graphdef, other), [[5, 4], [6, 1, 2]], **kw)
    assert len(traced) == count


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"prompts": []}, ConfigError, "at least one row"),
        ({"prompts": [[1], []]}, ConfigError, "prompt 1 is empty.*tokenizer.bos"),
        ({"prompts": [[1, VOCAB]]}, ConfigError, f"id {VOCAB} at place 1.*{VOCAB - 1}"),
        ({"prompts": [[-1]]}, ConfigError, "id -1"),
        ({"prompts": [[1.5]]}, ConfigError, "float64"),
        ({"stop_ids": [VOCAB]}, ConfigError, "stop_ids"),
        ({"new_tokens": 0}, ConfigError, "new_tokens = 0"),
        ({"prefill_chunk": 0}, ConfigError, "prefill_chunk"),
        ({"capacity": 5}, ShapeError, "capacity = 5.*3 tokens and 4 new.*6"),
        ({"sample": SampleConfig()}, ConfigError, "key"),
    ],
)
def test_errors(change, error, says):
    call = {"prompts": [[1, 2, 3]], "new_tokens": 4, "sample": GREEDY} | change
    with pytest.raises(error, match=f"(?s){says}"):
        generate(decoder(), call.pop("prompts"), **call)


def test_nan_is_an_error():
    graphdef, params = decoder()
    broken = params | {"final_norm": params["final_norm"] * np.nan}
    with pytest.raises(NonFiniteError, match=r"prompts \[0, 1, 2\]"):
        generate((graphdef, broken), PROMPTS, new_tokens=2, sample=GREEDY)


def test_score():
    model = decoder()
    z = full_logits(model, PROMPTS, 9)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for row, got, want in zip(PROMPTS, score(model, PROMPTS), logp, strict=True):
        expect = [want[t, row[t + 1]] for t in range(len(row) - 1)]
        assert got.shape == (len(row) - 1,)
        np.testing.assert_allclose(got, expect, rtol=1e-4, atol=1e-5)


# Sampling.


def draw(p, config, n=20_000, seed=0):
    logits = jnp.broadcast_to(jnp.log(jnp.array(p, jnp.float32)), (n, len(p)))
    ids = np.asarray(sample(logits, jax.random.key(seed), config))
    assert ids.dtype == np.int32
    return np.bincount(ids, minlength=len(p)) / n


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, [0.1, 0.5, 0.15, 0.25]),
        ({"temperature": 0.5}, np.array([0.01, 0.25, 0.0225, 0.0625]) / 0.345),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 9}, [0.1, 0.5, 0.15, 0.25]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8}, np.array([0, 0.5, 0.15, 0.25]) / 0.9),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.5, 0.15, 0.25]),
        # The nucleus is taken of what top-k left: 0.5 / 0.9 = 0.56 reaches 0.55, 0.5 does not.
        ({"top_k": 3, "top_p": 0.55}, [0, 1, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
    ],
)
def test_frequencies(config, want):
    n, want = 20_000, np.asarray(want)
    got = draw([0.1, 0.5, 0.15, 0.25], SampleConfig(**config), n)
    assert (got[want == 0] == 0).all()
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / n) + 1e-9).all(), got


def test_exact_mass_and_ties():
    # 1/2 + 1/4 is exactly 3/4: the smallest set has two tokens.
    assert (draw([0.25, 0.5, 0.125, 0.125], SampleConfig(top_p=0.75)) > 0).tolist() == [
        True, True, False, False,
    ]
    # Of equal probabilities the lowest ids stay.
    for config in ({"top_k": 2}, {"top_p": 0.5}):
        seen = draw([0.25] * 4, SampleConfig(**config)) > 0
        assert seen.tolist() == [True, True, False, False]
    assert draw([0.25] * 4, SampleConfig(temperature=0))[0] == 1


def test_impossible_tokens_and_rows():
    logits = jnp.array([[-jnp.inf] * 3, [-jnp.inf, 2.0, -jnp.inf], [-1e30, 0.0, -jnp.inf]])
    key = jax.random.key(1)
    with jax.debug_nans(True):
        for config in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 1}):
            ids = sample(logits, key, SampleConfig(**config))
            assert ids.tolist() == [0, 1, 1]
    low = sample(jnp.zeros((3, 5), jnp.bfloat16), key, SampleConfig(top_p=0.5))
    assert low.dtype == jnp.int32


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0}, {"temperature": math.inf}, {"temperature": "hot"}, {"top_k": 0},
        {"top_k": 2.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan},
    ],
)
def test_sample_config_checks(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SampleConfig(**bad)


def test_sample_checks_shape_and_key():
    with pytest.raises(ShapeError, match=r"\[B, V\]"):
        sample(jnp.zeros(3), jax.random.key(0), GREEDY)
    with pytest.raises(ConfigError, match="key"):
        sample(jnp.zeros((1, 3)), None, SampleConfig())


# Evaluation.


def test_uniform_model_has_log_vocab_nats():
    from attnlab.data.packing import PackedRows
    from attnlab.train.data import eval_batches
    from attnlab.train.optimizer import OptimizerConfig
    from attnlab.train.state import Trainer

    period = (registry.build_config("gqa", dim=16, num_heads=2),)
    model = DecoderConfig(vocab_size=256, period=period, repeats=1, mlp_dim=16)
    trainer = Trainer(model, OptimizerConfig(), 10, make_mesh(), RULES)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), trainer.abstract_state().params)
    stream = np.random.default_rng(0).integers(0, 255, 101).astype(np.uint16)
    stream[[0, 40]] = 255
    rows = PackedRows(stream, np.array([0, 40]), 8, 255)
    got = evaluate(trainer, params, eval_batches(rows, 4), bytes_per_token=2.0)
    assert got.tokens == rows.num_targets == 101
    assert got.nats_per_token == pytest.approx(math.log(256), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(4.0, rel=1e-6)
    assert evaluate(trainer, params, eval_batches(rows, 4)).bits_per_byte is None
    empty = {k: v[None] for k, v in rows.empty_row().items()}
    for nothing in ([], [empty]):
        with pytest.raises(DataError, match="no token"):
            evaluate(trainer, params, nothing)
    with pytest.raises(ConfigError, match="bytes_per_token"):
        evaluate(trainer, params, [], bytes_per_token=0.0)


def test_sums_are_fp64_and_nan_is_an_error(monkeypatch):
    monkeypatch.setattr("attnlab.infer.evaluate.place", lambda batch, sharding: batch)
    trainer = types.SimpleNamespace(
        evaluate=lambda params, batch, layers: batch, batch_sharding=None
    )
    big = (np.float32(2**24), np.float32(2**24))
    one = (np.float32(1), np.float32(1))
    got = evaluate(trainer, None, [big, *[one] * 5])
    assert got.tokens == 2**24 + 5 and got.nats_per_token == 1
    with pytest.raises(NonFiniteError, match="nan"):
        evaluate(trainer, None, [one, (np.float32("nan"), np.float32(1))])


# Feeding.


def test_blocks():
    two = [(0, (0, 2)), (0, (2, 4)), (1, (4, 6)), (1, (6, 8))]
    assert [feed.block_of(two, p, 8) for p in (0, 1)] == [(0, 2), (1, 2)]
    # Tensor axis across processes: 0 and 1 share rows, so do 2 and 3.
    shared = [(p, (4 * (p // 2), 4 * (p // 2) + 4)) for p in range(4)]
    assert [feed.block_of(shared, p, 8) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [feed.block_of([(p, (0, 8)) for p in range(3)], p, 8) for p in range(3)] == [(0, 1)] * 3
    with pytest.raises(MeshError, match="gap between rows 2 and 4"):
        feed.block_of([(0, (0, 2)), (1, (2, 4)), (0, (4, 6)), (1, (6, 8))], 0, 8)
    with pytest.raises(MeshError, match="equal blocks"):
        feed.block_of([(0, (0, 2)), (1, (2, 4)), (1, (4, 6))], 0, 6)
    with pytest.raises(MeshError, match="owns none"):
        feed.block_of(two, 2, 8)


def test_place_on_one_process():
    mesh = make_mesh()
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None))
    rows = 2 * len(mesh.devices.flat)
    assert feed.batch_shard(place, (rows, 4)) == (0, 1)
    batch = {"tokens": np.arange(rows * 4, dtype=np.int32).reshape(rows, 4)}
    out = feed.place(batch, place)["tokens"]
    assert out.sharding == place and out.dtype == np.int32
    np.testing.assert_array_equal(out, batch["tokens"])

    def refuse(shape):
        raise ValueError("not divisible")

    odd = types.SimpleNamespace(devices_indices_map=refuse, device_set={0, 1})
    with pytest.raises(MeshError, match=r"\(3, 4\): cannot be cut evenly over 2 devices"):
        feed.batch_shard.__wrapped__(odd, (3, 4))


def test_a_batch_that_does_not_divide_names_the_mesh_axes():
    mesh = jax.sharding.AbstractMesh((4, 2, 2), ("data", "fsdp", "seq"))
    spec = PartitionSpec(("data", "fsdp"), "seq")
    cuts = feed._cuts(NamedSharding(mesh, spec))
    assert cuts == "on axis 0 into 8 (mesh axes data, fsdp) and on axis 1 into 2 (mesh axes seq)"


def test_an_empty_mesh_text_is_refused():
    with pytest.raises(MeshError, match=r"mesh = '': '' is not AXIS=SIZE"):
        make_mesh("")
    assert make_mesh("data=-1,").size == jax.device_count()


_TWO = """
import sys
import numpy as np, jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec as P
from attnlab.core.axes import sharding
from attnlab.parallel import feed
from attnlab.parallel.mesh import make_mesh
me, whole = jax.process_index(), np.arange(32, dtype=np.int32).reshape(8, 4)
for axes, spec, want in (
    ("data=4", P(("data", "fsdp"), None), (me, 2)),
    ("data=2,tensor=2", P(("data", "fsdp"), None), (me, 2)),
    ("seq=4", P(("data", "fsdp"), "seq"), (0, 1)),
    ("seq=2,tensor=2", P(("data", "fsdp"), "seq"), (0, 1)),
):
    where = NamedSharding(make_mesh(axes), spec)
    index, count = feed.batch_shard(where, whole.shape)
    assert (index, count) == want, (axes, index, count)
    size = 8 // count
    out = feed.place({"x": whole[index * size : (index + 1) * size]}, where)["x"]
    assert out.shape == whole.shape
    for piece in out.addressable_shards:
        np.testing.assert_array_equal(piece.data, whole[piece.index])
print("done")
"""


def test_place_on_two_processes(root):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO, address, str(i)], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    for run in runs:
        out, _ = run.communicate(timeout=120)
        assert run.returncode == 0 and "done" in out, out
