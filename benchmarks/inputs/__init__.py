"""Inputs of benchmarks, drawn from a seed."""
