"""Vendor kernels (placeholder list until each is wired)."""

IMPLEMENTATIONS: tuple = ()
