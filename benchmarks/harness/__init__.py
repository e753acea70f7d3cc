"""What all benchmarks share: options, timing, the report, and the training loops that are timed."""
