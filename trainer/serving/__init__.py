"""Scoring requests with a snapshot: decoding, checking, batching, searching."""
