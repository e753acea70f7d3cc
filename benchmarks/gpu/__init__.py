"""The check of a machine with a GPU: whether results are right there, and how fast. See docs/gpu.md."""
