"""Text becomes ids without a vocabulary: the id is a hash of the text, the same everywhere and for ever.

The id of a text is the first 8 bytes of the MD5 of its UTF-8, read as a signed integer, the highest byte
first. Every SQL engine can compute that (`pipelines.ingest.portable_hash.text_id`). Of a million different
texts two have one id with a probability of 3 in 100 million.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

NOTHING: Final = 0
"""The id where there is no value. A feature whose ids are raw integers has the same."""


def hash_text(values: pa.Array | Sequence[str | None]) -> npt.NDArray[np.int64]:
    """The id of each text: int64 [n]; `NOTHING` where the text is None.

    Each different text is hashed once.
    """
    given = values if isinstance(values, pa.Array) else pa.array(values, pa.large_string())
    coded = given.dictionary_encode()
    # The last one is that of a null, whose place is -1.
    ids = np.array([*map(_id_of, coded.dictionary.to_pylist()), NOTHING], dtype=np.int64)
    place: npt.NDArray[np.int64] = coded.indices.cast(pa.int64()).fill_null(-1).to_numpy()
    return ids[place]


def _id_of(text: str) -> int:
    digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
