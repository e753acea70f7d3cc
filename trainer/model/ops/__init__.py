"""Operators that have a form of their own for a device; each module has one function that chooses."""
