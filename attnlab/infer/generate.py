"""Generation with decode caches, batched over ragged prompts, and scoring of given tokens.

Prompts are padded on the right with segment 0, which caches do not write and nothing sees; the
position of a token counts the real tokens in front of it. The prompts go through ``prefill`` in
chunks of one width (one compiled program), the new tokens through a scan over ``decode`` (another)
with the cache donated. Both are functions of a plain dict of parameters and stay compiled for later
calls with the same shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import versions
from attnlab.core.axes import constrain, current
from attnlab.core.errors import ConfigError, NonFiniteError, ShapeError
from attnlab.core.types import Seq
from attnlab.infer import sample as sampling
from attnlab.infer.sample import SampleConfig
from attnlab.models.decoder import Decoder

Model = Decoder | tuple[Any, dict]
Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What ``generate`` returns, one entry a prompt.

    Args:
        tokens: the new token ids, without the prompt and without the stop id.
        finished: ``"stop"`` (a stop id was drawn) or ``"length"`` (``new_tokens`` were drawn).
    """

    tokens: list[list[int]]
    finished: list[str]


def generate(
    model: Model,
    prompts: Prompts,
    *,
    new_tokens: int,
    sample: SampleConfig | None = None,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    state: Any = None,
    impl: Any = None,
    cache_dtype: Any = None,
    cache_policy: Any = None,
    prefill_chunk: int | None = None,
    capacity: int | None = None,
) -> Generated:
    """Continue every prompt by up to ``new_tokens`` tokens.

    Args:
        model: a ``Decoder``, or ``(graphdef, params)`` of ``versions.split_module``.
        prompts: token ids, each at least one. sample: default ``SampleConfig()``.
        key: random key; may be None for greedy decoding. The same key gives the same tokens.
        stop_ids: a row ends before the first of these. impl: attention implementation.
        state: explicit state of the layers, as in ``Decoder.init_state``, where they have one.
        cache_dtype: of the cache, default ``precision.cache``. cache_policy: its form, such as
            ``core.paging.Paged(page=64)``; None is the plain one.
        prefill_chunk: tokens a row in one prefill call, default all of the longest prompt.
        capacity: tokens a row the cache holds, default what this call needs; a fixed value lets
            calls with prompts of other lengths and equal chunks reuse the compiled programs.

    Raises:
        ConfigError, ShapeError: before anything runs. NonFiniteError: the logits became NaN.
    """
    graphdef, params, config = _parts(model)
    sample = SampleConfig() if sample is None else sample
    rows = _check_tokens("prompt", prompts, config.vocab_size)
    stops = _check_tokens("stop_ids", [stop_ids], config.vocab_size, least=0)[0]
    _check_count("new_tokens", new_tokens)
    lengths = np.array([len(row) for row in rows], np.int32)
    longest, batch = int(lengths.max()), len(rows)
    needed = longest + new_tokens - 1  # the last token is never an input
    capacity = needed if capacity is None else _check_count("capacity", capacity)
    if capacity < needed:
        raise ShapeError(
            f"cache capacity = {capacity}",
            f"the longest prompt has {longest} tokens and {new_tokens} new ones follow, of which "
            f"all but the last are cached: {needed}",
            f"use a capacity of at least {needed}, shorter prompts or fewer new_tokens",
        )
    chunk = longest if prefill_chunk is None else _check_count("prefill_chunk", prefill_chunk)
    chunk = min(chunk, capacity)
    if key is None:
        if not sample.greedy:
            raise ConfigError(
                "key = None", f"temperature = {sample.temperature} draws at random",
                "pass key=jax.random.key(seed) or SampleConfig(temperature=0)",
            )
        key = jax.random.key(0)

    dtype = None if cache_dtype is None else jnp.dtype(cache_dtype).name
    static = {"graphdef": graphdef, "context": _context()}
    tokens = _pad(rows, -(-longest // chunk) * chunk)
    caches = _init(
        params, **static, batch=batch, capacity=capacity, dtype=dtype, policy=cache_policy
    )
    static["impl"] = impl if impl is None or isinstance(impl, str) else tuple(impl)
    last = np.zeros((batch, config.dim), jnp.dtype(config.precision.compute))
    for start in range(0, tokens.shape[1], chunk):
        piece = tokens[:, start : start + chunk]
        last, caches = _prefill(
            params, state, piece, np.int32(start), lengths, last, caches, **static
        )
    drawn, finite, _ = _decode(
        params, state, key, last, lengths, stops, caches, **static, count=new_tokens, sample=sample
    )
    if not np.asarray(finite).all():
        raise NonFiniteError(
            f"logits of prompts {np.flatnonzero(~np.asarray(finite)).tolist()}", "are NaN",
            "check the parameters, or widen precision.compute",
        )
    return _collect(np.asarray(drawn))


def score(
    model: Model, tokens: Prompts, *, state: Any = None, impl: Any = None
) -> list[np.ndarray]:
    """Natural-log probability of every token but the first of each row, fp32 ``[len - 1]``."""
    graphdef, params, config = _parts(model)
    rows = _check_tokens("tokens", tokens, config.vocab_size)
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = _pad(rows, int(lengths.max()))
    impl = impl if impl is None or isinstance(impl, str) else tuple(impl)
    out = _score(params, state, padded, lengths, graphdef=graphdef, context=_context(), impl=impl)
    return [row[: n - 1] for row, n in zip(np.asarray(out), lengths, strict=True)]


# The device's part: functions of plain arrays. ``context`` is the mesh and rules of the enclosing
# ``axes.sharding`` block; as a static argument it keeps programs of different meshes apart.


@functools.partial(
    jax.jit, static_argnames=("graphdef", "context", "batch", "capacity", "dtype", "policy")
)
def _init(params, *, graphdef, context, batch, capacity, dtype, policy=None):
    """Empty caches, placed by their logical axes."""
    model = versions.merge_module(graphdef, params)
    caches = model.init_caches(batch, capacity, dtype, policy=policy)

    def place(cache):
        axes = getattr(type(cache), "AXES", {})
        pinned = {n: constrain(getattr(cache, n), None, *a) for n, a in axes.items()}
        for field in dataclasses.fields(cache):
            if dataclasses.is_dataclass(inner := getattr(cache, field.name)):
                pinned[field.name] = place(inner)
        return dataclasses.replace(cache, **pinned)

    return [place(cache) for cache in caches]


@functools.partial(
    jax.jit, static_argnames=("graphdef", "context", "impl"), donate_argnames=("last", "caches")
)
def _prefill(params, state, tokens, start, lengths, last, caches, *, graphdef, context, impl):
    """``(last, caches)`` after the chunk ``tokens[B, C]`` that begins at ``start``.

    ``last[B, D]`` is the hidden state of each row's last prompt token, once its chunk has passed.
    """
    model = versions.merge_module(graphdef, params)
    chunk = tokens.shape[1]
    positions = start + jnp.broadcast_to(jnp.arange(chunk, dtype=jnp.int32), tokens.shape)
    seq = Seq(positions, (positions < lengths[:, None]).astype(jnp.int32))
    h, caches = model.prefill(tokens, seq, caches, state=state, impl=impl)
    at = lengths - 1 - start
    here = jnp.take_along_axis(h, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
    inside = (at >= 0) & (at < chunk)
    return jnp.where(inside[:, None], here.astype(last.dtype), last), caches


@functools.partial(
    jax.jit, static_argnames=("graphdef", "context", "impl", "count", "sample"),
    donate_argnames="caches",
)
def _decode(
    params, state, key, last, lengths, stops, caches, *, graphdef, context, impl, count, sample
):
    """``(tokens[B, count], finite[B], caches)``: -1 is a stop id, -2 what follows it.

    A row that has stopped goes on as padding and writes nothing. The caches are returned so that
    their memory can be reused in place.
    """
    model = versions.merge_module(graphdef, params)

    def draw(step, h, done, finite):
        logits = model.logits(h)
        finite &= done | ~jnp.isnan(logits).any(axis=-1)
        token = sampling.sample(logits, jax.random.fold_in(key, step), sample)
        stop = (token[:, None] == stops[None, :]).any(axis=1)
        return token, jnp.where(done, -2, jnp.where(stop, -1, token)), done | stop, finite

    def body(carry, step):
        token, done, finite, caches = carry
        positions = (lengths + step - 1)[:, None]
        seq = Seq(positions, jnp.where(done, 0, 1)[:, None].astype(jnp.int32))
        h, caches = model.decode(token[:, None], seq, caches, state=state, impl=impl)
        token, shown, done, finite = draw(step, h[:, 0], done, finite)
        return (token, done, finite, caches), shown

    none = jnp.zeros(lengths.shape, bool)
    token, first, done, finite = draw(0, last, none, ~none)
    steps = jnp.arange(1, count, dtype=jnp.int32)
    (_, _, finite, caches), rest = jax.lax.scan(body, (token, done, finite, caches), steps)
    tokens = jnp.concatenate([first[None], rest]).T
    return constrain(tokens, None, None), constrain(finite, None), caches


@functools.partial(jax.jit, static_argnames=("graphdef", "context", "impl"))
def _score(params, state, tokens, lengths, *, graphdef, context, impl):
    """``log p(tokens[:, t + 1])`` as ``[B, T - 1]``, 64 positions of logits at a time."""
    model = versions.merge_module(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    seq = Seq(positions, (positions < lengths[:, None]).astype(jnp.int32), "packed")
    h = model.hidden(tokens, seq, state=state, impl=impl).h

    def one(pair):
        h, target = pair  # [B, D], [B]
        z = jax.nn.log_softmax(model.logits(h), axis=-1)
        return jnp.take_along_axis(z, target[:, None], axis=-1)[:, 0]

    pairs = (h[:, :-1].swapaxes(0, 1), tokens[:, 1:].T)
    out = jax.lax.map(one, pairs, batch_size=64)
    return constrain(out.T, None, None)


def _context():
    """The mesh and rules that ``constrain`` will see, hashable."""
    context = current()
    if context is None:
        return None
    mesh, rules = context
    return mesh, tuple(sorted((name, tuple(axes)) for name, axes in rules.items()))


def _parts(model: Model):
    """``(graphdef, params, DecoderConfig)``."""
    if isinstance(model, Decoder):
        return *versions.split_module(model), model.config
    graphdef, params = model
    module = versions.merge_module(graphdef, params)
    if not isinstance(module, Decoder):
        raise ConfigError(
            f"model = {type(module).__name__}", "only a Decoder generates",
            "build a DecoderConfig around the layer",
        )
    return graphdef, params, module.config


def _check_tokens(what: str, rows: Prompts, vocab: int, least: int = 1) -> list[np.ndarray]:
    if not len(rows):
        raise ConfigError(f"{what}s = []", "there is nothing to work on", "pass at least one row")
    out = []
    for i, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.size < least:
            raise ConfigError(
                f"{what} {i} is empty", "there is no token to continue from",
                "start it with tokenizer.bos",
            )
        if ids.size and (ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer)):
            raise ConfigError(
                f"{what} {i} has shape {ids.shape} and dtype {ids.dtype}",
                "must be a flat list of token ids", "pass tokenizer.encode(text)",
            )
        bad = np.flatnonzero((ids < 0) | (ids >= vocab))
        if bad.size:
            raise ConfigError(
                f"{what} {i} has id {ids[bad[0]]} at place {bad[0]}",
                f"ids are 0 to vocab_size - 1 = {vocab - 1}",
                "encode with the tokenizer the model was trained with",
            )
        out.append(ids.astype(np.int32).reshape(-1))
    return out


def _check_count(name: str, value: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} = {value!r}", "is a count of at least 1", f"use {name} = 1")
    return int(value)


def _pad(rows: list[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def _collect(drawn: np.ndarray) -> Generated:
    tokens = [[int(t) for t in row if t >= 0] for row in drawn]
    return Generated(tokens, ["stop" if (row == -1).any() else "length" for row in drawn])
