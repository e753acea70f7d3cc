"""Files of vectors: every form that is read, what is counted, and what is refused in one clear line."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import ConfigError, DataError
from tests.helpers.logs import manifest_of
from tests.helpers.similarity import drawn_vectors, write_parquet
from trainer.config.sections import DataConfig
from trainer.config.similarity import VectorsConfig
from trainer.data.similarity import vectors as vectors_module
from trainer.data.similarity.directions import directions_of
from trainer.data.similarity.files import VectorCounts, read_vectors
from trainer.data.similarity.keys import Key
from trainer.data.similarity.loading import bytes_held, load_vectors
from trainer.log.hashed_ids import hash_text
from trainer.log.schema import FeatureInfo, LogManifest
from trainer.log.vocabulary import spell

ROWS = 10
LIST = pa.list_(pa.float32())


def with_item(info: FeatureInfo, **facts: Any) -> LogManifest:
    return manifest_of(features={"item_id": info, "category_id": FeatureInfo(rows=3)}, **facts)


def found(file: Path, info: FeatureInfo, log: Path = Path("log")) -> tuple[Any, VectorCounts]:
    return read_vectors(VectorsConfig(file=file), Key.of(with_item(info), "content", "item_id"), log)


def test_ids_of_a_log_without_vocabulary(tmp_path: Path) -> None:
    given = drawn_vectors(1, [12, 3, 7, 0, 4])  # 12 and 0 are no ids of the log, and 7 has zeros
    vectors, counts = found(write_parquet(tmp_path / "v.parquet", given), FeatureInfo(rows=ROWS))
    assert vectors.ids.tolist() == [3, 4]
    expected = directions_of(np.float32([given[3], given[4]]))
    assert np.array_equal(vectors.directions, expected)
    assert counts == VectorCounts(used=2, of=9, unknown=2, zero=1)
    assert counts.line(Path("v.parquet"), "item_id") == (
        "v.parquet: 2 of 9 ids of item_id in the log have a vector; 2 row(s) of ids that the log does not "
        "have, 1 vector(s) of zeros, which count as missing"
    )
    assert vectors.places(np.array([4, 5, 3])).tolist() == [1, vectors_module.NOWHERE, 0]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.large_list(pa.float16()), pa.list_(pa.int8(), 2)]
)
def test_any_list_of_numbers_is_a_vector(tmp_path: Path, kind: pa.DataType) -> None:
    values = [[1, 2], None, [3, -4], [1, 2]]
    lists = (
        pa.array(values, pa.list_(pa.float32())).cast(kind) if "half" in str(kind) else pa.array(values, kind)
    )
    table = pa.table({"item_id": pa.array([1, 2, None, 1], pa.int32()), "vector": lists})
    pq.write_table(table, tmp_path / "v.parquet", row_group_size=2)
    vectors, counts = found(tmp_path / "v.parquet", FeatureInfo(rows=ROWS))
    assert np.array_equal(vectors.directions, directions_of(np.array([[1.0, 2.0]])))
    assert counts == VectorCounts(used=1, of=9, null=2, repeated=1)


def test_values_of_a_vocabulary_and_raw_ids(tmp_path: Path) -> None:
    (tmp_path / "log" / "vocab").mkdir(parents=True)
    values = pa.array(["b", "a", "ö"], pa.large_string())
    pq.write_table(
        pa.table({"value": values, "id": [1, 2, 3]}), tmp_path / "log" / "vocab" / "item_id.parquet"
    )
    file, info = (
        tmp_path / "v.parquet",
        FeatureInfo(rows=4, vocabulary=hashlib.sha256(spell(values)).hexdigest()),
    )
    lists = pa.array([[1.0], [-1.0], [1.0]], LIST)
    pq.write_table(pa.table({"item_id": ["a", "z", "ö"], "vector": lists}), file)
    vectors, counts = found(file, info, tmp_path / "log")
    assert vectors.ids.tolist() == [2, 3] and counts == VectorCounts(used=2, of=3, unknown=1)
    words = pa.array(["a", "z", "ö"]).dictionary_encode()
    pq.write_table(pa.table({"item_id": words, "vector": lists}), file)
    assert found(file, info, tmp_path / "log")[0].ids.tolist() == [2, 3]
    raw = FeatureInfo(rows=1, raw=True, hashed=True)
    assert found(file, raw)[0].ids.tolist() == sorted(hash_text(["a", "z", "ö"]).tolist())
    pq.write_table(pa.table({"item_id": [-(2**63), 2**63 - 1, 0], "vector": lists}), file)
    vectors, counts = found(file, FeatureInfo(rows=1, raw=True))
    assert vectors.ids.tolist() == [-(2**63), 0, 2**63 - 1]
    assert vectors.places(np.array([2**63 - 1, 5, 0])).tolist() == [2, -1, 1]
    assert "vectors of 3 ids of item_id" in counts.line(file, "item_id")
    with pytest.raises(DataError, match="holds integers, and the raw values of item_id in the log are text"):
        found(file, info, tmp_path / "log")


def test_a_folder_of_files_and_one_reading_for_all_readers(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    write_parquet(tmp_path / "v" / "b.parquet", drawn_vectors(1, [1, 2]))
    write_parquet(tmp_path / "v" / "a.parquet", drawn_vectors(2, [3]))
    data = DataConfig.model_validate(
        {
            "vectors": {"content": {"file": str(tmp_path / "v")}, "unused": {}},
            "similarity": {"near": {"of": "content", "to": "content"}},
        }
    )
    manifest = with_item(FeatureInfo(rows=ROWS))
    loaded = load_vectors(data, manifest)
    assert list(loaded) == ["content"] and loaded["content"].vectors.ids.tolist() == [1, 2, 3]
    assert load_vectors(data, manifest)["content"] is loaded["content"]
    # Three vectors of six numbers, twice; a file says more of small pages.
    assert 2 * 3 * (8 + 2 * 6) <= bytes_held(data) < 2000
    before = loaded["content"].digest
    write_parquet(tmp_path / "v" / "a.parquet", drawn_vectors(3, [3, 4, 5, 6]))
    again = load_vectors(data, manifest)["content"]
    assert again.vectors.ids.tolist() == [1, 2, 3, 4, 5, 6] and again.digest != before


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        (
            {"vector": pa.array([[1.0, 2.0], [1.0]], LIST)},
            "row 1: has 1 numbers, and the vectors before have 2",
        ),
        ({"vector": pa.array([[1.0], [float("nan")]], LIST)}, "row 1: holds null, NaN or infinity"),
        ({"vector": pa.array([[None], [1.0]], LIST)}, "row 0: holds null, NaN or infinity"),
        ({"vector": pa.array([[], []], LIST)}, "row 0: has 0 numbers"),
        ({"vector": pa.array([1.0, 2.0])}, "holds double; a vector is a list of numbers"),
        ({"vector": pa.array([["a"], ["b"]])}, "a vector is a list of numbers"),
        ({"item_id": pa.array([3, 3])}, "two different vectors of one id .the log's 3.; keep one of them"),
        ({"item_id": pa.array(["3", "4"])}, "holds text, and item_id has none: the log has no vocabulary"),
        ({"item_id": pa.array([0.5, 1.0])}, "holds double; ids are integers or text"),
        ({"item_id": pa.array([90, 91])}, "says nothing of this log .*2 row.s. of ids that the log does not"),
        ({"vector": pa.array([None, None], LIST)}, "0 of 9 ids of item_id .*2 row.s. without an id"),
        ({"vector": pa.array([[0.0], [0.0]], LIST)}, "2 vector.s. of zeros"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(tmp_path: Path, columns: dict[str, Any], problem: str) -> None:
    table = {"item_id": pa.array([1, 2]), "vector": pa.array([[1.0], [2.0]], LIST), **columns}
    if "item_id" in columns:
        table["vector"] = pa.array([[1.0, 0.0], [0.0, 1.0]], LIST)
    pq.write_table(pa.table(table), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=problem):
        found(tmp_path / "v.parquet", FeatureInfo(rows=ROWS))


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"v\.parquet: no such file; see \[data\.vectors\]"):
        found(tmp_path / "v.parquet", FeatureInfo(rows=ROWS))
    pq.write_table(pa.table({"id": [1]}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match="column item_id: no such column; the file has id"):
        found(tmp_path / "v.parquet", FeatureInfo(rows=ROWS))
    (tmp_path / "v.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="unreadable"):
        found(tmp_path / "v.parquet", FeatureInfo(rows=ROWS))


@pytest.mark.parametrize(
    ("key", "facts", "problem"),
    [
        ("item_ids", {}, "the log has no such feature; did you mean 'item_id'?"),
        ("tags", {}, "it has any number of ids"),
        ("user_id", {"named": {"user_id": FeatureInfo(rows=3)}}, "the log's users have text for names"),
    ],
)
def test_keys_that_have_no_vectors(key: str, facts: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.vectors\.content\.key = '{key}': .*{problem}"):
        Key.of(manifest_of(rich=True, **facts), "content", key)
