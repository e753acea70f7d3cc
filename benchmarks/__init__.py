"""Measurements of the trainer, each beside a baseline in the same process; see README.md in this folder."""
