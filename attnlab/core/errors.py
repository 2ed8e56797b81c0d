"""Named errors. Each states the offending value, the rule it broke and the fix."""

from __future__ import annotations


class AttnlabError(Exception):
    """Base of every error attnlab raises on purpose.

    Args:
        what: the offending thing and its value, e.g. ``"num_heads = 6"``.
        rule: the rule it breaks, e.g. ``"must be a multiple of num_kv_heads = 4"``.
        fix: one concrete way out, e.g. ``"use num_heads = 8"``.
    """

    def __init__(self, what: str, rule: str, fix: str):
        self.what, self.rule, self.fix = what, rule, fix
        super().__init__(f"{what}: {rule}. Fix: {fix}.")

    def __reduce__(self):
        return type(self), (self.what, self.rule, self.fix)


class ConfigError(AttnlabError, ValueError):
    """A configuration field, recipe or command-line value is wrong."""


class ShapeError(AttnlabError, ValueError):
    """An array has the wrong shape."""


class DtypeError(AttnlabError, TypeError):
    """An array has the wrong dtype."""


class MeshError(AttnlabError, ValueError):
    """A mesh, strategy or process count does not fit the devices or the model."""


class DataError(AttnlabError, ValueError):
    """A corpus, tokenizer or data file is missing, empty or malformed."""


class CheckpointError(AttnlabError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class ImplementationError(AttnlabError, NotImplementedError):
    """The implementation asked for by name cannot serve this call."""


class UnsupportedError(AttnlabError, NotImplementedError):
    """The variant does not have the capability asked for."""


class NonFiniteError(AttnlabError, FloatingPointError):
    """Loss or gradients stayed non-finite for too many steps in a row."""
