"""The fair comparison of variants: small models on generated tasks."""
