"""Does one layer of softmax attention learn what is known of it: one-step gradient descent?

    python experiments/in_context_regression.py                # 1, 2 and 4 heads, 3 seeds each
    python experiments/in_context_regression.py --steps 20000  # until the heads have their pattern
    python experiments/in_context_regression.py --plot         # only the plot, from stored rows

The model of He et al. 2025, arXiv 2503.12734, on ``tasks.regression.QueryRegression``: the query
token attends to 40 pairs, H heads as wide as a token, no positions, no biases, and the values of
the heads are added up. Known: 1.10 for answering 0, 0.41 for one head, 0.24 for two or more, 0.114
for the best estimator. Heads are then (w, -w) with values (m, -m): attention weights grow with
x . x', and their values sum to nothing. All seeds are trained at once (vmap).

No device; about 3 minutes on two free cores for 2,000 steps. Rows, resumed by cell (heads, steps):
results/in_context_regression.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab import Full, attention
from attnlab.analysis.bench import append, stamp
from attnlab.tasks.regression import QueryRegression, Vectors

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "in_context_regression.json"
TASK, HEADS, SEEDS, BATCH, RATE, POINTS = QueryRegression(), (1, 2, 4), 3, 256, 3e-3, 40
KNOWN = {"answering 0": 1.10, "one head": 0.41, "gradient descent": 0.2384, "best": 0.1142}
Params = dict[str, jax.Array]


def init(key: jax.Array, heads: int) -> Params:
    """``q, k, v[E, H, E]`` and ``o[H, E]`` for tokens of E numbers, uniform in fan-in^-0.5."""
    width = TASK.dims + 1
    keys = dict(zip("qkvo", jax.random.split(key, 4), strict=True))
    uniform = functools.partial(jax.random.uniform, minval=-(width**-0.5), maxval=width**-0.5)
    shapes = dict.fromkeys("qkv", (width, heads, width)) | {"o": (heads, width)}
    return {name: uniform(keys[name], shape) for name, shape in shapes.items()}


def predict(params: Params, inputs: jax.Array, impl: str | None = None) -> jax.Array:
    """The answer ``[B]`` to the query, the last of ``inputs[B, T, E]``; it is no key."""
    def project(x, name):
        return jnp.einsum("bte,ehd->bthd", x, params[name])

    pairs, query = inputs[:, :-1], inputs[:, -1:]
    places = jnp.broadcast_to(jnp.arange(TASK.seq_len), inputs.shape[:2])
    heads = attention(
        project(query, "q"), project(pairs, "k"), project(pairs, "v"), mask=Full(), impl=impl,
        positions=(places[:, -1:], places[:, :-1]),
    )
    return jnp.einsum("bthd,hd->b", heads, params["o"])


def loss(params: Params, batch: Vectors, impl: str | None = None) -> jax.Array:
    """Squared error of the query's answer."""
    return ((predict(params, batch.inputs, impl) - batch.targets[:, -1]) ** 2).mean()


def train(heads: int, steps: int, seeds: int = SEEDS) -> tuple[Params, np.ndarray]:
    """Parameters and evaluation losses ``[seeds, POINTS]``, of all seeds at once."""
    optimizer = optax.adam(RATE)

    def one(seed):
        start, data = jax.random.split(jax.random.key(seed))
        params = init(start, heads)

        def step(state, key):
            params, moments = state
            grads = jax.grad(loss)(params, TASK.sample(key, BATCH))
            updates, moments = optimizer.update(grads, moments)
            return (optax.apply_updates(params, updates), moments), None

        def part(state, keys):
            state, _ = jax.lax.scan(step, state, keys)
            return state, loss(state[0], TASK.sample(jax.random.key(10**6), 20_000))

        keys = jax.random.split(data, (POINTS, steps // POINTS))
        (params, _), losses = jax.lax.scan(part, (params, optimizer.init(params)), keys)
        return params, losses

    params, losses = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return params, np.asarray(losses)


def pattern(params: Params) -> dict[str, Any]:
    """Of each head: ``omega``, the mean diagonal of the logits' form on x, and how far off it is
    from a multiple of one (``off``: rms beside the diagonal); ``mu``, what a unit of y gives."""
    logits = jnp.einsum("ehd,fhd->hef", params["k"], params["q"]) / np.sqrt(TASK.dims + 1)
    inner = np.asarray(logits)[:, :-1, :-1]
    values = np.asarray(jnp.einsum("ehd,hd->he", params["v"], params["o"]))
    beside = ~np.eye(TASK.dims, dtype=bool)
    return {
        "omega": inner.diagonal(axis1=1, axis2=2).mean(1).tolist(),
        "off": np.sqrt((inner[:, beside] ** 2).mean(1)).tolist(), "mu": values[:, -1].tolist(),
    }


def measure(steps: int) -> None:
    stored = json.loads(ROWS.read_text()) if ROWS.exists() else []
    done = {(row["heads"], row["steps"]) for row in stored}
    test = TASK.sample(jax.random.key(10**6 + 1), 200_000)
    for heads in HEADS:
        if (heads, steps) in done:
            print(f"{heads} heads, {steps} steps: trained already")
            continue
        started = time.perf_counter()
        params, curves = train(heads, steps)
        seconds = time.perf_counter() - started
        for seed in range(SEEDS):
            mine = jax.tree.map(lambda x, seed=seed: x[seed], params)
            found = {"heads": heads, "steps": steps, "seed": seed, "loss": float(loss(mine, test))}
            append(ROWS, {
                **found, **pattern(mine), "curve": curves[seed].tolist(),
                "seconds_all_seeds": round(seconds, 1), "command":
                f"python experiments/in_context_regression.py --steps {steps}", **stamp(),
            })
            print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))


def plot() -> None:
    from matplotlib.figure import Figure

    rows = json.loads(ROWS.read_text())
    most = max(row["steps"] for row in rows)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = dict(zip(HEADS, (("#0077bb", "-"), ("#ee7733", "--"), ("#009988", ":")), strict=True))
    for row in rows:
        if row["steps"] == most:
            color, line = styles[row["heads"]]
            x = np.arange(1, POINTS + 1) * (most // POINTS)
            label = f"{row['heads']} head{'s' * (row['heads'] > 1)}" if row["seed"] == 0 else None
            axes.plot(x, row["curve"], color=color, ls=line, lw=1.5, label=label)
    for name, value in KNOWN.items():
        axes.axhline(value, color="#888888", lw=0.8)
        axes.annotate(name, (most, value), ha="right", va="top", fontsize=8, color="#555555")
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 0.4, 1], labels=["0.1", "0.2", "0.4", "1"])
    axes.minorticks_off()
    axes.set_xlabel("steps of 256 rows")
    axes.set_ylabel("squared error")
    axes.legend()
    axes.set_title("In-context regression by one layer of softmax attention, 3 seeds")
    figure.savefig(RESULTS / "in_context_regression.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="a multiple of 40 (2000)")
    parser.add_argument("--plot", action="store_true", help="only draw the plot")
    options = parser.parse_args()
    if options.steps < POINTS or options.steps % POINTS:
        parser.error(f"--steps {options.steps} is not a multiple of {POINTS}")
    if not options.plot:
        measure(options.steps)
    plot()
