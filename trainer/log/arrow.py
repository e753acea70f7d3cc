"""What Arrow has several of: encodings of one type, and errors of one damaged file."""

from __future__ import annotations

import pyarrow as pa

# What pyarrow raises on a damaged file; a name that is no UTF-8 any more surfaces as a ValueError.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)


def is_list(kind: pa.DataType) -> bool:
    """Lists of any length or of a fixed one, and views of lists."""
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return True
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_text(kind: pa.DataType) -> bool:
    """Text and views of text; a dictionary of text is none."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
