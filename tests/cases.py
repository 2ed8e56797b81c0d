"""One entry a variant: tiny configs that switch its features, and the oracle it must equal."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from attnlab.core import registry
from attnlab.core.rope import Yarn


@dataclasses.dataclass(frozen=True)
class Same:
    """Two settings that must compute the same: ``params`` maps the left one's parameters."""

    name: str
    left: dict[str, Any]
    right: dict[str, Any]
    params: Callable[[dict], dict] = lambda params: params
    right_variant: str | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """What the suite needs to know of a variant.

    Args:
        configs: field values of tiny configs, richest last. oracle: ``"module:function"`` with
            ``function(params, x, positions, segments, **fields) -> y``; the signature names the
            fields of the config that it wants. bad: field values that must be refused.
        same: degenerate settings. reach: tokens, the query's own included, from which a query's
            output may depend (None = all of its document). shifts: whether outputs ignore a common
            shift of positions.
    """

    configs: tuple[dict[str, Any], ...]
    oracle: str
    bad: tuple[dict[str, Any], ...] = ()
    same: tuple[Same, ...] = ()
    reach: Callable[[Any], int | None] = lambda config: getattr(config, "window", None)
    shifts: Callable[[Any], bool] = lambda config: not getattr(config, "sink_tokens", 0)

    def run_oracle(self, config, params, x, seq):
        """``y`` of the oracle for a config."""
        module, _, name = self.oracle.partition(":")
        function = getattr(importlib.import_module(module), name)
        wanted = [
            name for name, p in inspect.signature(function).parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        fields = {name: getattr(config, name) for name in wanted}
        return function(params, x, seq.positions, seq.segments, **fields)


def _repeat_kv(params: dict) -> dict:
    """Each key/value head written out for its two query heads."""
    twice = {k: np.repeat(params[k], 2, axis=1) for k in ("w_k", "w_v")}
    return params | twice


def _cca_reach(config) -> int | None:
    """The window, from whose first key the convolutions or the value shift look further back."""
    behind = max(config.history, int(config.value_shift))
    return None if config.window is None else config.window + behind


_GQA = {"dim": 24, "num_heads": 4}
_SQA = {"dim": 24, "num_heads": 4, "num_heads_total": 6}
_CCA = {"dim": 24, "num_heads": 4, "head_dim": 4}
_MLA = {"dim": 16, "num_heads": 4, "kv_rank": 8, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}

CASES: dict[str, Case] = {
    "gqa": Case(
        configs=(
            _GQA | {"num_kv_heads": 2},
            _GQA | {"window": 5, "sink_tokens": 2, "sink_logits": True, "qk_norm": True},
            _GQA | {"num_kv_heads": 1, "head_dim": 7, "value_dim": 5, "rotary_fraction": 0.6,
                    "rope_pairing": "interleaved", "bias": True, "logit_cap": 2.0, "scale": 0.3,
                    "window": 4},
        ),
        oracle="attnlab.testing.oracles:gqa_oracle",
        bad=(
            {"num_heads": 5}, {"num_kv_heads": 3}, {"window": 0}, {"sink_tokens": -1},
            {"rotary_fraction": 1.5}, {"rope_pairing": "neox"}, {"head_dim": 0}, {"num_heads": 2.0},
            {"logit_cap": 0.0}, {"scale": 0.0}, {"norm_eps": -1.0}, {"value_dim": 0},
        ),
        same=(
            Same("each key/value head copied", _GQA | {"num_kv_heads": 2}, _GQA, _repeat_kv),
            Same("window of the whole row", _GQA | {"window": 24}, _GQA),
            Same("sinks without a window", _GQA | {"sink_tokens": 3}, _GQA),
            Same("huge logit cap", _GQA | {"logit_cap": 1e6}, _GQA),
        ),
    ),
    "mla": Case(
        configs=(
            _MLA | {"q_rank": 10},
            _MLA | {"latent_norm": False, "rope_pairing": "half", "window": 5, "scale": 0.4,
                    "yarn": Yarn(factor=4, original_length=8), "decode_form": "absorbed"},
            _MLA | {"num_heads": 2, "q_rank": 9, "nope_dim": 5, "decode_form": "expanded",
                    "yarn": Yarn(factor=8, original_length=16, mscale=0.7), "window": 4},
        ),
        oracle="attnlab.testing.oracle_mla:mla_oracle",
        bad=(
            {"num_heads": 0}, {"kv_rank": 0}, {"q_rank": 0}, {"nope_dim": 0}, {"value_dim": -1},
            {"rope_dim": 3}, {"rope_dim": -2}, {"rope_pairing": "neox"}, {"window": 0},
            {"decode_form": "fast"}, {"scale": 0.0}, {"norm_eps": -1.0},
        ),
        same=(
            Same("window of the whole row", _MLA | {"window": 24}, _MLA),
            Same("yarn of factor 1", _MLA | {"yarn": Yarn(factor=1)}, _MLA),
        ),
    ),
    "sqa": Case(
        configs=(
            _SQA | {"num_kv_heads": 2},
            _SQA | {"num_heads": 2, "num_kv_heads": 4, "window": 5, "sink_tokens": 1,
                    "sink_logits": True, "qk_norm": True},
            _SQA | {"num_heads": 2, "num_kv_heads": 1, "gate": True, "out_bias": True, "bias": True,
                    "value_dim": 5, "window": 4, "rotary_fraction": 0.5},
        ),
        oracle="attnlab.testing.oracle_sqa:sqa_oracle",
        bad=(
            {"num_kv_heads": 3}, {"num_kv_heads": 0}, {"num_heads_total": 5},
            {"num_heads_total": 0}, {"window": 0}, {"sink_tokens": -1}, {"rotary_fraction": -0.5},
            {"logit_cap": -1.0}, {"scale": 0.0},
        ),
        same=(
            Same("all the heads of the model", _GQA | {"num_heads_total": 4}, _GQA,
                 right_variant="gqa"),
            Same("window of the whole row", _SQA | {"window": 24}, _SQA),
        ),
    ),
    "cca": Case(
        configs=(
            _CCA,
            _CCA | {"num_kv_heads": 1, "window": 5, "sink_tokens": 2, "sink_logits": True,
                    "conv_widths": (3, 4), "temperature_mode": "raw"},
            _CCA | {"num_kv_heads": 2, "head_dim": 6, "convs": 1, "conv_bias": False,
                    "value_shift": False, "rotary_fraction": 0.7, "rope_pairing": "interleaved",
                    "logit_cap": 3.0, "temperature_mode": "exp_clamp", "window": 4,
                    "sink_logits": True},
        ),
        oracle="attnlab.testing.oracle_cca:cca_oracle",
        bad=(
            {"head_dim": None}, {"num_kv_heads": 3}, {"conv_widths": (0, 2)},
            {"conv_widths": (2, 2, 2)}, {"convs": 3}, {"temperature_mode": "log"},
            {"conv_init": "zeros"}, {"window": 0}, {"logit_cap": 0.0}, {"norm_eps": -1.0},
        ),
        same=(
            Same("without its parts it is grouped-query attention",
                 _CCA | {"num_kv_heads": 2, "convs": 0, "value_shift": False, "qk_mean": False,
                         "qk_norm": False},
                 _CCA | {"num_kv_heads": 2}, right_variant="gqa"),
            Same("window of the whole row", _CCA | {"window": 24}, _CCA),
        ),
        reach=_cca_reach,
    ),
}


def configs() -> list[tuple[str, Case, Any]]:
    """``(id, case, config)`` of every registered variant that has a case."""
    return [
        (f"{name}{i}", case, registry.build_config(name, **fields))
        for name, case in CASES.items()
        for i, fields in enumerate(case.configs)
    ]
