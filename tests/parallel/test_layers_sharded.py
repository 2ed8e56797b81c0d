"""Every variant under dp, fsdp, tp and their product on 8 virtual devices = on one device."""

from __future__ import annotations

import eight
import pytest


@pytest.mark.devices8
@pytest.mark.timeout(1500)  # 90 s of processor time; eight virtual devices crawl on a busy machine
def test_sharded_is_unsharded():
    print(eight.run("sharded_layers.py", timeout=1400))
