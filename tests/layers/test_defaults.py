"""A default that follows from other fields goes on following them when these change."""

from __future__ import annotations

import dataclasses

from attnlab.core.config import from_dict, override, to_dict
from attnlab.layers.cca import CCAConfig
from attnlab.layers.gqa import GQAConfig
from attnlab.layers.sqa import SQAConfig
from attnlab.models.decoder import DecoderConfig
from attnlab.models.presets import preset


def test_set_moves_the_defaults_along():
    mha = GQAConfig(dim=16, num_heads=2)
    model = DecoderConfig(vocab_size=8, period=(mha,), repeats=1, mlp_dim=8)
    for stored in (model, from_dict(DecoderConfig, to_dict(model))):
        c = override(stored, ["period.0.num_heads=4"]).period[0]
        assert (c.K, c.H, c.V) == (4, 4, 4), "still multi-head attention of width D"
        c = override(stored, ["period.0.head_dim=16"]).period[0]
        assert (c.K, c.H, c.V) == (2, 16, 16)
    assert override(preset("350m"), ["period.0.head_dim=64"]).period[0].V == 64


def test_replace_moves_the_defaults_along():
    sqa = SQAConfig(dim=24, num_heads=2, num_heads_total=6)
    assert (sqa.K, sqa.H) == (2, 4)
    assert dataclasses.replace(sqa, num_heads_total=12).H == 2
    cca = dataclasses.replace(CCAConfig(dim=16, num_heads=4, head_dim=2), num_heads=2)
    assert (cca.K, cca.V) == (2, 2)
