"""Ids of text without a vocabulary."""

from __future__ import annotations

import hashlib

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from trainer.log.hashed_ids import NOTHING, hash_text


def test_known_ids_stay_what_they_are() -> None:
    """They lie in logs and checkpoints, so that no later version may give others."""
    ids = hash_text(["milk", "", "Käse", None])
    assert ids.tolist() == [-1387750238746945017, -3162216497309240828, -8601981060749577716, NOTHING]


@given(st.lists(st.none() | st.text()), st.booleans())
def test_each_text_has_the_first_bytes_of_its_digest(texts: list[str | None], arrow: bool) -> None:
    def slow(text: str | None) -> int:
        if text is None:
            return NOTHING
        number = int(hashlib.md5(text.encode()).hexdigest()[:16], 16)
        return number - (1 << 64) if number >= 1 << 63 else number

    assert hash_text(pa.array(texts, pa.string()) if arrow else texts).tolist() == list(map(slow, texts))
