from attnlab.ops.attention.reference import forward  # noqa: F401
