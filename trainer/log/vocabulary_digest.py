"""What the digest of a vocabulary is of: its values, whichever engine wrote the file that holds them."""

from __future__ import annotations

import pyarrow as pa


def spelled(values: pa.Array) -> bytes:
    """Each value as text, with a line end behind it."""
    return "".join(f"{value}\n" for value in values.to_pylist()).encode()
