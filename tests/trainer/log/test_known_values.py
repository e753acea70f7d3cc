"""Values by id and ids by value: the same from mapped files as a dictionary has them, in bounded memory."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.log.known_values as module
from embeddings.errors import DataError, UnavailableError
from tests.helpers.vocabularies import all_large
from trainer.log.known_values import KnownValues, drop_unused, known_values, map_values, values_of


def written(file: Path, values: Sequence[Any]) -> str:
    """Writes a vocabulary -> its digest."""
    pq.write_table(pa.table({"value": values, "id": range(1, len(values) + 1)}), file)
    return hashlib.sha256("".join(f"{value}\n" for value in values).encode()).hexdigest()


TEXT = st.lists(st.text(max_size=5), unique=True, min_size=1, max_size=40)
INTEGERS = st.lists(
    st.integers(-(2**63), 2**63 - 1) | st.integers(0, 50), unique=True, min_size=1, max_size=40
)


@settings(deadline=None, max_examples=60)
@given(
    values=TEXT | INTEGERS,
    asked=st.lists(st.text(max_size=5), max_size=20),
    numbers=st.lists(st.integers(0, 99)),
    one_hash=st.booleans(),
)
def test_look_ups_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[Any],
    asked: list[str],
    numbers: list[int],
    one_hash: bool,
) -> None:
    """In files and in memory; also where many texts share a hash."""
    folder, known = tmp_path_factory.mktemp("known"), {value: at + 1 for at, value in enumerate(values)}
    digest, kind = written(folder / "v.parquet", values), pa.int64()
    if isinstance(values[0], str):
        kind = pa.large_string()
    wanted: list[Any] = [*(asked if kind == pa.large_string() else numbers), *values[::2], values[0]]
    with ExitStack() as held:
        if one_hash:
            short = lambda content, offsets: (np.diff(offsets) % 2).astype(np.uint64)  # noqa: E731
            held.enter_context(patch.object(module, "_hash", short))
        held.enter_context(all_large())
        mapped = known_values(folder / "v.parquet", digest, folder / "cache")
        again = known_values(folder / "v.parquet", digest, folder / "cache")
        for found in (mapped, again, KnownValues.of(pa.array(values, kind))):
            assert found.ids(pa.array(wanted, kind)).tolist() == [known.get(value, 0) for value in wanted]
            assert found.values.to_pylist() == values and len(found) == len(values)
            assert found.text == (kind == pa.large_string()) and found.values.type == kind
        longest = max(len(value.encode()) for value in values) if mapped.text else 8
        assert mapped.longest == longest == KnownValues.of(pa.array(values, kind)).longest
        (folder / "names").mkdir()
        assert map_values(folder / "v.parquet", digest, folder / "names").equals(mapped.values)
        ids = np.unique(np.array([0, 1, len(values), len(values) + 1, *numbers]))
        expected = {i: values[i - 1] for i in ids.tolist() if 0 < i <= len(values)}
        assert values_of(folder / "v.parquet", digest, ids) == expected


def test_the_next_start_finds_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads no more of the vocabulary than its footer; what is damaged is written again."""
    file, cache = tmp_path / "v.parquet", tmp_path / "cache"
    values = [f"name {number}" for number in range(100)]
    digest = written(file, values)
    with all_large():
        known_values(file, digest, cache)
        (folder,) = (cache / "vocabularies").iterdir()
        for name in ("key", "place", "values", "offsets", "facts.json"):
            content = (folder / name).read_bytes()
            for damage in (content[:-3], None):
                (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
                found = known_values(file, digest, cache)
                assert found.ids(pa.array(values[::-1], pa.large_string())).tolist() == list(
                    range(100, 0, -1)
                )
                assert (folder / name).read_bytes() == content
        monkeypatch.setattr(module, "stream_values", None)
        assert known_values(file, digest, cache).values.to_pylist() == values
        # Neither a lock nor a draft stays.
        assert list((cache / "vocabularies").iterdir()) == [folder]
        file.unlink()
        with pytest.raises(DataError, match="missing, so nobody can tell"):
            known_values(file, digest, cache)


def test_values_that_are_spelled_alike_have_their_own_files(tmp_path: Path) -> None:
    """The digest of the text "1" is that of the integer 1."""
    digests = {written(tmp_path / "text.parquet", ["1", "2"]), written(tmp_path / "numbers.parquet", [1, 2])}
    (digest,) = digests
    with all_large():
        text, numbers = (
            known_values(tmp_path / name, digest, tmp_path / "cache")
            for name in ("text.parquet", "numbers.parquet")
        )
    assert text.text and not numbers.text
    assert text.ids(pa.array(["2"], pa.large_string())).tolist() == numbers.ids(pa.array([2])).tolist() == [2]


def test_values_with_line_breaks_are_never_taken_for_those_of_another_file(tmp_path: Path) -> None:
    """The digest is of lines, so both have the same one, and as many bytes."""
    both = [["a\nb", "c", "d"], ["a", "b\nc", "d"]]
    digests = [written(tmp_path / f"{at}.parquet", values) for at, values in enumerate(both)]
    assert digests[0] == digests[1]
    with all_large():
        for at in (0, 1, 1, 0):
            known = known_values(tmp_path / f"{at}.parquet", digests[0], tmp_path / "cache")
            assert known.values.to_pylist() == both[at]
            assert known.ids(pa.array([*both[at], *both[1 - at]], pa.large_string()))[:3].tolist() == [
                1,
                2,
                3,
            ]
            assert (known.folder is None) == (at == 1)
    # What the second one is mapped from is gone.
    assert len(list((tmp_path / "cache" / "vocabularies").iterdir())) == 1


def test_old_files_go_once_all_vocabularies_of_a_start_are_open(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def opened(name: str) -> KnownValues:
        file = tmp_path / f"{name}.parquet"
        return known_values(file, written(file, [name, "other"]), cache)

    with all_large():
        for name in ("forgotten", "users"):
            folder = opened(name).folder
            assert folder is not None
            os.utime(folder, (0, 0))
        # A new one, and one of days ago, which the writing of the new one leaves alone.
        new, inode = opened("items"), (cache / "vocabularies").joinpath(folder.name).stat().st_ino
        users = opened("users")
    drop_unused([new.folder, users.folder, None])
    assert {new.folder, users.folder} == set((cache / "vocabularies").iterdir())
    assert users.folder == folder and folder.stat().st_ino == inode


def test_another_vocabulary_and_a_full_disk_are_refused(tmp_path: Path) -> None:
    file, cache = tmp_path / "v.parquet", tmp_path / "cache"
    digest = written(file, ["a", "b"])
    with all_large():
        with pytest.raises(DataError, match="is not the vocabulary in the log's manifest"):
            known_values(file, "0" * 64, cache, of_log=True)
        # What is no digest names no folder.
        with pytest.raises(DataError, match="is not the vocabulary that the model"):
            known_values(file, "../../elsewhere", cache)
        assert not list((cache / "vocabularies").iterdir())
        (tmp_path / "taken").write_text("")
        with pytest.raises(
            UnavailableError, match=r"its 2 values cannot be kept in .*taken.*another --cache"
        ):
            known_values(file, digest, tmp_path / "taken")


def test_memory_does_not_follow_the_number_of_values(tmp_path: Path) -> None:
    """Neither that of writing the files nor that of the look-ups: the peak is that of a run."""
    peaks = []
    for count in (20_000, 160_000):
        file = tmp_path / f"{count}.parquet"
        names = [f"user number {number:08d}" for number in range(count)]
        digest = written(file, names)
        asked = pa.array(names[:: count // 100], pa.large_string())
        del names
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        with all_large(1 << 12):
            known = known_values(file, digest, tmp_path / "cache")
            assert known.ids(asked).tolist() == list(range(1, count + 1, count // 100))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 1 << 20
    # Eight times the values.
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 16 * 160_000
