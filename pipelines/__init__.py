"""Whole jobs, one verb a file."""
