"""The one reader of vocabulary files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.errors import DataError
from trainer.log.vocabulary import read_values, spell


def reference(values: list[object]) -> bytes:
    """Each value as text, with a line end behind it."""
    return "".join(f"{value}\n" for value in values).encode()


@given(
    st.one_of(
        st.lists(st.text(max_size=5) | st.none(), max_size=20).map(lambda v: pa.array(v, pa.string())),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20).map(lambda v: pa.array(v, pa.int64())),
    ),
    st.integers(0, 5),
)
def test_values_are_spelled_as_the_plain_reference_does(values: pa.Array, start: int) -> None:
    part = values.slice(start)
    assert bytes(spell(part)) == reference(part.to_pylist())


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_a_vocabulary_without_values_keeps_its_type(tmp_path: Path, kind: pa.DataType) -> None:
    file, none = tmp_path / "a.parquet", hashlib.sha256().hexdigest()
    pq.write_table(pa.table({"value": pa.array([], kind), "id": pa.array([], pa.int64())}), file)
    wanted = pa.large_string() if kind == pa.string() else pa.int64()
    assert read_values(file, none).type == wanted and len(read_values(file, none)) == 0


def test_each_owner_of_the_digest_has_its_own_remedy(tmp_path: Path) -> None:
    file, digest = tmp_path / "a.parquet", hashlib.sha256(reference(["x", "y"])).hexdigest()
    pq.write_table(pa.table({"value": ["x", "y"], "id": [1, 2], "count": [0, 0]}), file)
    assert read_values(file, digest).to_pylist() == ["x", "y"]
    with pytest.raises(DataError, match=r"that the model was trained with; take the one of the model's log"):
        read_values(file, "0" * 64)
    with pytest.raises(DataError, match=r"in the log's manifest, .*; take another copy of that log"):
        read_values(file, "0" * 64, of_log=True)
    with pytest.raises(DataError, match=r"missing, so nobody can tell .*; take another copy of that log"):
        read_values(tmp_path / "b.parquet", digest, of_log=True)
    pq.write_table(pa.table({"word": ["x"], "id": [1]}), file)
    with pytest.raises(DataError, match="has the columns word, id, not value and id"):
        read_values(file, digest)
