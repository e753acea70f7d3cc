"""Nets of the experts of the head `experts`, one file each."""
