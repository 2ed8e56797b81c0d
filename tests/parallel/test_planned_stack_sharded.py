"""A stack that plans its masks on 8 virtual devices: every device its own rows, same numbers."""

from __future__ import annotations

import eight
import pytest


@pytest.mark.devices8
@pytest.mark.timeout(900)
def test_planned_on_meshes():
    assert eight.run("planned_stack.py", timeout=800).count("collectives") == 3
