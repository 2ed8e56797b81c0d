"""What a ``Seq`` carries of its plans: which masks get them, and whose tokens they are."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.core.dispatch import Implementation
from attnlab.core.errors import ConfigError, ImplementationError
from attnlab.core.mask import Causal, Full, MaskMod, Prefix, Window, same
from attnlab.core.types import Precision, Seq
from attnlab.layers.gqa import GQAConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.ops.attention import OP, attention
from attnlab.ops.attention.ahead import plan_ahead
from attnlab.testing.budget import identical
from attnlab.testing.fixtures import pack

B, T, N = 2, 48, 4
MASK = Causal() & Window(9)
SPANS = jnp.array([5, 9, 20, 48])


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    """An implementation that reads tiles as wide as the heads."""
    monkeypatch.setitem(OP.implementations, "listed", Implementation(
        "listed", lambda call: None, OP.implementations["xla"].forward,
        tiles=lambda call: [(8, call.H), (8, call.V)],
    ))


def tokens(layout: str = "packed") -> Seq:
    seq = pack(((20, 9, 15, -4), (48,)), layout)
    return Seq(jnp.asarray(seq.positions), jnp.asarray(seq.segments), layout)


def ahead(seq, mask=MASK, heads=(N, 2), widths=(16, 16), impl="listed", **more):
    return plan_ahead(
        seq, mask=mask, heads=heads, widths=widths, precision=Precision(), impl=impl, **more
    )


def sizes(planned):
    return [(lists.block_q, lists.block_k, lists.transposed) for lists in planned.lists]


def test_found_for_that_mask_and_those_heads():
    seq = ahead(tokens())
    found = seq.planned(Causal() & Window(9), N)
    assert sizes(found) == [(8, 16, False), (8, 16, True)]
    assert seq.planned(Causal() & Window(8), N) == Causal() & Window(8)
    assert seq.planned(MASK, 2) is MASK and tokens().planned(MASK, N) is MASK
    assert seq.keywords(MASK, N)["mask"] is found
    more = ahead(seq, mask=Causal(), heads=(2, 2))
    assert more.planned(MASK, N) is found and more.planned(Causal(), 2).T == T


def test_sizes_add_up():
    """Layers of other widths read other lists of one mask; what is there is not made again."""
    seq = ahead(tokens())
    wider = ahead(ahead(seq, widths=(16, 24)), widths=(24, 16))
    found = wider.planned(MASK, N)
    assert sizes(found) == [
        (8, 16, False), (8, 16, True), (8, 24, False), (8, 24, True)
    ]
    assert found.lists[0] is seq.planned(MASK, N).lists[0] and len(wider.plans.masks) == 1


def test_nothing_to_plan():
    seq = tokens()
    assert ahead(seq, impl="xla") is seq and ahead(seq, impl=None) is seq
    whole = Seq.full(B, T)
    assert ahead(whole) is whole, "constants"
    assert ahead(whole, mask=Causal() | Prefix(jnp.array([3, 9]))) is whole, "known here"
    empty = Seq(jnp.zeros((B, 0), jnp.int32))
    assert ahead(empty) is empty

    @jax.jit
    def traced(length):
        seq = ahead(whole, mask=(mask := Causal() | Prefix(length)))
        return seq.planned(mask, N).lists[0].full.number

    assert traced(jnp.array([3, 9])).shape == (1, 1, T // 8), "made on the device"


def test_refusals_are_those_of_the_call():
    with pytest.raises(ImplementationError, match="gpu: runs on Hopper GPUs"):
        ahead(tokens(), impl="gpu")


# Whose tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda seq: dataclasses.replace(seq, positions=seq.positions + 1),
    lambda seq: dataclasses.replace(seq, segments=jnp.where(seq.segments == 2, 1, seq.segments)),
    lambda seq: dataclasses.replace(seq, segments=None, layout="any"),
    lambda seq: dataclasses.replace(tokens(), plans=seq.plans),
    lambda seq: jax.tree.map(lambda x: x + 0, dataclasses.replace(tokens(), plans=seq.plans)),
], ids=["positions", "segments", "no segments", "another Seq", "transformed"])
def test_plans_of_other_tokens_raise(change):
    seq = ahead(tokens())
    other = change(seq)
    config = GQAConfig(dim=16, num_heads=N)
    layer, x = config.build(nnx.Rngs(0)), jnp.zeros((B, T, 16))
    model = DecoderConfig(vocab_size=9, period=(config,), repeats=1, mlp_dim=8)
    decoder = model.build(nnx.Rngs(0))
    for use in (
        lambda: other.planned(MASK, N),
        lambda: other.planned(Causal(), 1),
        lambda: other.with_plan(Causal(), 1, Causal()),
        lambda: layer(x, other),
        lambda: jax.jit(lambda other: layer(x, other).y)(other),
        lambda: decoder.hidden(jnp.zeros((B, T), jnp.int32), other, impl="listed"),
    ):
        with pytest.raises(ConfigError, match=r"plans of other positions .*plans=None"):
            use()
    dropped = dataclasses.replace(other, plans=None)
    assert dropped.planned(MASK, N) is MASK
    assert jnp.isfinite(layer(x, dropped).y).all()


def test_another_layout_raises():
    seq = dataclasses.replace(ahead(tokens()), layout="any")
    q = jnp.zeros((B, T, N, 16))
    with pytest.raises(ConfigError, match=r"layout = 'packed'.*layout = 'any'"):
        attention(q, q, q, **seq.keywords(MASK, N))


def test_transformations_keep_plans():
    """jit hands other arrays to its function: they are the tokens of the plans all the same."""
    seq = ahead(tokens())
    q = jax.random.normal(jax.random.key(0), (B, T, N, 16))

    def attend(q, seq):
        assert sizes(seq.planned(MASK, N)) == sizes(planned)
        return attention(q, q, q, **seq.keywords(MASK, N), impl="xla")

    planned = seq.planned(MASK, N)
    expected = attention(q, q, q, **tokens().keywords(MASK, N), impl="xla")
    np.testing.assert_allclose(jax.jit(attend)(q, seq), expected, rtol=1e-5, atol=1e-6)
    again = jax.tree.map(jnp.copy, seq)
    identical(again.planned(MASK, N), planned)
    assert jax.tree.structure(again) == jax.tree.structure(seq)
    q = jax.ShapeDtypeStruct(q.shape, q.dtype)
    assert jax.eval_shape(jax.checkpoint(attend), q, seq).shape == (B, T, N, 16)


def test_leaves_without_plans():
    flat, _ = jax.tree_util.tree_flatten_with_path(tokens())
    assert [jax.tree_util.keystr(path) for path, _ in flat] == [".positions", ".segments"]
    assert len(jax.tree.leaves(Seq.full(B, T))) == 1


def test_captured_arrays():
    """A mask with arrays is known again by the very arrays, not by a function written alike."""

    def look():
        return Causal() & MaskMod.of(lambda head, q_pos, k_pos: q_pos - k_pos < SPANS[head])

    mask = look()
    seq = ahead(tokens(), mask=mask)
    assert seq.planned(mask, N).lists[0].heads == N
    other = look()
    assert seq.planned(other, N) is other
    inside = jax.jit(lambda seq: jnp.int32(seq.planned(mask, N) is mask))
    assert inside(seq) == 1, "whether traced arrays are those of the mask cannot be known"


def test_same_masks():
    row = jnp.array([1, 2])
    assert same(MASK, Causal() & Window(9)) and not same(MASK, Causal() & Window(8))
    assert same(Prefix(row), Prefix(row)) and not same(Prefix(row), Prefix(jnp.array([1, 2])))
    assert same(Prefix(1000), Prefix(999 + 1)) and not same(Prefix(3), Prefix(4))
    assert not same(Causal() | Window(9), MASK) and not same(Causal(), Full())
    assert not same(Prefix(1), Prefix(row[0])) and not same(Causal() & Causal(), Causal())
    both = [MaskMod.of(lambda head, q_pos, k_pos: q_pos > SPANS[head]) for _ in range(2)]
    assert same(both[0] & MASK, both[0] & (Causal() & Window(9))) and not same(*both)
