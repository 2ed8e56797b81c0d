"""The TPU kernel from state to state, in the interpreters: against fp64 over all keys, and xla."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnlab.core.dispatch import Implementation
from attnlab.core.mask import Causal, Full, Mask, Window
from attnlab.core.versions import enable_x64
from attnlab.ops.attention import OP, tpu, tpu_blocks, tpu_steps, xla
from attnlab.ops.attention.carry import Carry, attention_step, finish, merge
from attnlab.testing.budget import close


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries from position ``first`` on over keys that come in parts, cut at ``cuts``."""

    mask: Mask
    T: int = 130
    cuts: tuple[int, ...] = (0, 128, 128, 300)
    N: int = 4
    K: int = 2
    H: int = 16
    V: int = 24
    first: int = 170
    score: object = None
    size: int | None = None  # of the array that the score captures, a head
    cap: float | None = None
    dtype: str = "float32"


def slope(captured):
    return lambda s, head, q_pos, k_pos: s + captured[head] * (k_pos - q_pos)


def columns(captured):
    return lambda s, head, q_pos, k_pos: s * 1.1 + captured[head, k_pos]


CASES = {
    "three parts, one empty": Case(Causal()),
    "cap and slope": Case(Causal() & Window(200), score=slope, size=0, cap=4.0),
    "by key": Case(Causal(), score=columns, size=300, cuts=(0, 100, 300)),
    "rows without keys": Case(Causal(), first=-60, cuts=(0, 40, 40, 128, 256)),
    "no key at all": Case(Causal(), first=-200, cuts=(0, 128, 200)),
    "heads as rows": Case(Full(), T=5, N=12, cuts=(0, 77, 77, 300), score=slope, size=0),
    "bf16": Case(Causal(), H=32, dtype="bfloat16"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tiles of 128 x 128, and the kernel where a call by name looks for it."""

    def small(T, *_):
        return (T + -T % 16 if T < 128 else 128), 128

    monkeypatch.setattr(tpu_blocks, "forward_blocks", small)
    monkeypatch.setattr(tpu_blocks, "backward_blocks", lambda T, *_: small(max(T, 128)))
    monkeypatch.setattr(xla, "tile_sizes", lambda *_: (64, 64))
    use(monkeypatch, True)


def use(monkeypatch, interpret):
    step = functools.partial(tpu.step, interpret=interpret)
    monkeypatch.setitem(
        OP.implementations, "tpu",
        Implementation("tpu", lambda call: None, tpu.forward, partitions=False, step=step),
    )


def arrays(case: Case, dtype):
    S = case.cuts[-1]
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = {
        "q": (1, case.T, case.N, case.H), "k": (1, S, case.K, case.H), "v": (1, S, case.K, case.V),
    }
    a = {
        name: jax.random.normal(key, shape, "float32").astype(case.dtype).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items())
    }
    wide = "float64" if dtype == "float64" else "float32"
    a["sink"] = jax.random.normal(keys[3], (case.N,), "float32").astype(wide)
    if case.size is not None:
        shape = (case.N, case.size) if case.size else (case.N,)
        a["captured"] = (0.02 * jax.random.normal(keys[4], shape, "float32")).astype(wide)
    fixed = {
        "do": jax.random.normal(keys[5], (1, case.T, case.N, case.V), "float32").astype(wide),
        "dlse": jax.random.normal(keys[6], (1, case.T, case.N), "float32").astype(wide),
    }
    return a, fixed


def step(case: Case, a, carry, low, high, impl):
    q = jnp.arange(case.T)[None] + case.first
    return attention_step(
        carry, a["q"], a["k"][:, low:high], a["v"][:, low:high], mask=case.mask, scale=0.3,
        score_mod=None if case.score is None else case.score(a["captured"]), logit_cap=case.cap,
        positions=(q, jnp.arange(low, high)[None]), impl=impl, softmax_dtype=a["sink"].dtype.name,
    )


def in_parts(case: Case, a, impl, how="chain", sink=True):
    """``(o, lse)``, the parts one after the other, or each by itself and merged."""
    carry = None
    for low, high in zip(case.cuts, case.cuts[1:]):
        before, impl_here = carry, impl[0] if low == 0 else impl[-1]
        carry = step(case, a, before if how == "chain" else None, low, high, impl_here)
        if how == "merge" and before is not None:
            carry = merge(before, carry)
    return finish(carry, a["sink"] if sink else None)


def gradients(f, a, fixed):
    def loss(a):
        o, lse = f(a)
        seen = jnp.where(jnp.isfinite(lse), lse, 0)
        return (o * fixed["do"]).sum() + (seen * fixed["dlse"]).sum(), (o, lse)

    grads, (o, lse) = jax.jit(jax.grad(loss, has_aux=True))(a)
    return {"o": o, "lse": lse} | {f"gradient of {name}": x for name, x in grads.items()}


def exact(case: Case, sink=True):
    """By ``xla`` in float64 over all keys at once."""
    with enable_x64():
        a, fixed = arrays(case, "float64")
        whole = dataclasses.replace(case, cuts=(0, case.cuts[-1]))
        found = gradients(lambda a: in_parts(whole, a, ("xla",), sink=sink), a, fixed)
        return jax.tree.map(np.asarray, found)


def agree(case: Case, impl=("tpu",), how="chain", sink=True):
    a, fixed = arrays(case, case.dtype)
    found = gradients(lambda a: in_parts(case, a, impl, how, sink), a, fixed)
    expected = exact(case, sink)
    rough = dict.fromkeys(expected)
    if case.dtype != "float32":
        rough = gradients(lambda a: in_parts(case, a, ("xla",), how, sink), a, fixed)
    assert found["o"].dtype == found["lse"].dtype == jnp.float32
    for name, x in expected.items():
        kind = "gradient" if "gradient" in name else "op"
        close(found[name], x, rough[name], dtype=case.dtype, kind=kind, name=name)
    return found


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_one_call(name):
    agree(CASES[name])


def test_rows_without_keys():
    found = agree(CASES["rows without keys"], sink=False)
    empty = np.isneginf(found["lse"])
    assert empty[:, :60].all() and not empty[:, 60:].any()
    assert (np.asarray(found["o"])[:, :60] == 0).all()
    assert (np.asarray(found["gradient of q"])[:, :60] == 0).all()


@pytest.mark.parametrize("impl", [("tpu",), ("xla", "tpu"), ("tpu", "xla")], ids="-".join)
def test_merged_and_mixed(impl):
    """States of both implementations are of one kind, also in what they pass back."""
    agree(CASES["cap and slope"], impl, "chain")
    agree(CASES["cap and slope"], impl, "merge")


def test_gradient_of_a_state():
    """Of o, m and l of a state from elsewhere, some rows of it empty: as xla in float64."""
    case = Case(Causal(), cuts=(0, 140), first=-30)  # the first 30 rows see no key here

    def given(dtype):
        a, fixed = arrays(case, dtype)
        keys = jax.random.split(jax.random.key(5), 3)
        shape = (1, case.T, case.N)
        seen = (jnp.arange(case.T) % 3 > 0)[:, None]
        m, l = (jax.random.normal(key, shape, "float32").astype(dtype) for key in keys[:2])
        o = jax.random.normal(keys[2], (*shape, case.V), "float32").astype(dtype)
        state = Carry(
            jnp.where(seen[..., None], o, 0), jnp.where(seen, 8 * m, -jnp.inf),
            jnp.where(seen, 1 + l * l, 0),
        )
        return {"state": state, **a}, fixed

    def found(dtype, impl):
        a, fixed = given(dtype)

        def loss(a):
            o, lse = finish(step(case, a, a["state"], 0, 140, impl), a["sink"])
            return (o * fixed["do"]).sum() + (lse * fixed["dlse"]).sum()

        grads = jax.jit(jax.grad(loss))(a)
        return grads | {f"carry.{n}": getattr(grads["state"], n) for n in "oml"}

    with enable_x64():
        expected = jax.tree.map(np.asarray, found("float64", "xla"))
    grads = found("float32", "tpu")
    for name in ("q", "k", "v", "sink", "carry.o", "carry.m", "carry.l"):
        close(grads[name], expected[name], kind="gradient", name=name)
        assert np.abs(expected[name]).max() > 1e-2, name


def test_many_steps_do_not_drift():
    """Forty parts of which each renews the reference: no more wrong than one call."""
    case = Case(Full(), T=128, N=1, K=1, cuts=tuple(range(0, 161, 4)))
    a, _ = arrays(case, "float32")
    a["k"] = a["k"] * jnp.linspace(1, 40, 160)[:, None, None]  # logits up to about 100
    with enable_x64():
        b = {name: x.astype("float64") for name, x in a.items()}
        expected = in_parts(dataclasses.replace(case, cuts=(0, 160)), b, ("xla",))
    one = jax.jit(lambda a: in_parts(dataclasses.replace(case, cuts=(0, 160)), a, ("tpu",)))(a)
    many = jax.jit(lambda a: in_parts(case, a, ("tpu",)))(a)
    for name, x, y, z in zip(("o", "lse"), many, expected, one):
        close(x, y, z, kind="op", name=name)


def test_in_parts_of_the_table(monkeypatch):
    monkeypatch.setattr(tpu_steps, "MOST_STEPS", 2)
    monkeypatch.setattr(tpu_blocks, "sums_limit", lambda kind: 128 * 1024)
    agree(Case(Causal(), T=260, cuts=(0, 128, 300)))


def test_without_races(monkeypatch):
    pltpu.reset_tpu_interpret_mode_state()
    use(monkeypatch, pltpu.InterpretParams(detect_races=True))
    agree(dataclasses.replace(CASES["cap and slope"], cuts=(0, 128, 256)))
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state
    except ImportError:  # jax 0.12 raises by itself
        return
    races = getattr(state, "races", None)
    assert races is None or not races.races_found
