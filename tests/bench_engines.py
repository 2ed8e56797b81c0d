"""A stand-in for a measuring engine, in a process of its own: it answers, fails, dies or hangs."""

from __future__ import annotations

import os
import time


class Engine:
    def __init__(self):
        self.sick = False

    def stamp(self):
        return {"device": "NVIDIA H200", "platform": "gpu", "versions": {"jax": "1"}}

    def healthy(self):
        return not self.sick

    def measure(self, how: str):
        if how == "die":
            os._exit(3)
        if how == "hang":
            time.sleep(600)
        self.sick = how == "fault"
        if how != "answer":
            raise RuntimeError(f"{how}\n\n  second line")
        return {"answer": 1}
