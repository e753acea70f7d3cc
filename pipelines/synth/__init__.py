"""Sequence logs with a planted signal: every label is a draw from a known probability, so an oracle exists.

Pure numpy, seeded. Each kind states its source and its equation; `kinds` lists them.
"""
