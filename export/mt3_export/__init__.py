"""Checkpoints of the MT3 family to bundles that mt3_runtime runs."""
