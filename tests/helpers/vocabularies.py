"""Small vocabularies that are handled as large ones are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from trainer.log import known_values, vocabulary
from trainer.storage import sorted_rows


@contextmanager
def all_large(run: int = 8) -> Iterator[None]:
    """Every vocabulary is written into files, in runs of so many values."""
    with ExitStack() as held:
        for owner, name, value in (
            (known_values, "_MOST_ROWS", 0),
            (sorted_rows, "_RUN", run),
            (sorted_rows, "_EVERY", max(run // 4, 1)),
            (vocabulary, "_ROWS_AT_ONCE", max(run // 2, 1)),
        ):
            held.enter_context(patch.object(owner, name, value))
        yield
