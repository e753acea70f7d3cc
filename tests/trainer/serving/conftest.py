"""A log and a snapshot of it, for every file here that has none of its own."""

from tests.helpers.served import log, snapshot

__all__ = ["log", "snapshot"]
