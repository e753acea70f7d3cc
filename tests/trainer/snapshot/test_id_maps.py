"""Maps of ids in a snapshot: base and deltas are the whole map, and nothing that contradicts itself loads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from embeddings.errors import SnapshotError
from embeddings.ids.frozen import FrozenIds
from embeddings.ids.rules import IdRules
from trainer.snapshot.id_maps import LayeredIds, changes, read_ids, write_ids
from trainer.snapshot.manifest import SnapshotIds

RULES = IdRules(capacity=20, shared_rows=3)
IDS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-5, 5)
MAPS = st.dictionaries(IDS, st.integers(3, 22), max_size=20).map(
    # Of ids that have one row, the first.
    lambda rows: {i: row for row, i in {row: i for i, row in reversed(rows.items())}.items()}
)


def frozen(rows: Mapping[int, int]) -> FrozenIds:
    ids = sorted(rows)
    return FrozenIds(RULES, np.array(ids, dtype=np.int64), np.array([rows[i] for i in ids], dtype=np.int64))


def described(rows: Mapping[int, int]) -> SnapshotIds:
    return SnapshotIds(capacity=RULES.capacity, shared_rows=RULES.shared_rows, live=len(rows))


def written(root: Path, maps: list[dict[int, int]]) -> Iterator[tuple[LayeredIds, SnapshotIds, int]]:
    """Each map as the next version: read again, its description, bytes of its file."""
    versions: list[tuple[Path, str, SnapshotIds]] = []
    base = None
    for number, rows in enumerate(maps):
        folder = root / f"v{number}"
        folder.mkdir()
        entry, file = write_ids(folder, "ids/0.safetensors", frozen(rows), described(rows), base)
        if entry.base_live is None:
            versions.clear()
        versions.append((folder, file.path, entry))
        base = read_ids(versions, RULES)
        yield base, entry, file.bytes


@settings(max_examples=60, deadline=None)
@given(st.lists(MAPS, min_size=1, max_size=5), st.lists(IDS, max_size=5))
def test_layers_are_the_map_that_was_written(maps: list[dict[int, int]], others: list[int]) -> None:
    """Against a dict, version by version; a delta has what changed and no more."""
    before: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as root:
        for rows, (found, entry, size) in zip(maps, written(Path(root), maps), strict=True):
            wanted = np.array([*rows, *before, *others, *rows], dtype=np.int64)
            known = [int(i) in rows for i in wanted]
            assert found.knows(wanted).tolist() == known
            own = found.look_up(wanted)
            assert own[known].tolist() == [rows[int(i)] for i in wanted[known]]
            assert found.own_rows(wanted).tolist() == [rows.get(int(i), -1) for i in wanted]
            assert own.tolist() == frozen(rows).look_up(wanted).tolist()
            whole, expected = found.whole(), frozen(rows)
            assert (whole.ids.tolist(), whole.rows.tolist()) == (
                expected.ids.tolist(),
                expected.rows.tolist(),
            )
            changed = [i for i in rows if before.get(i) != rows[i]]
            gone = [i for i in before if i not in rows]
            if entry.base_live is not None:
                assert (entry.set, entry.gone, entry.base_live) == (len(changed), len(gone), len(before))
            assert size <= 512 + 16 * len(changed) + 8 * len(gone)
            before = rows


def test_an_id_that_moves_is_no_tombstone() -> None:
    """It lost its row and got another one, or two ids have changed places."""
    delta = changes(frozen({5: 3, 7: 4, 9: 6}), frozen({5: 4, 7: 3, -2: 6}))
    assert delta.ids.tolist() == [-2, 5, 7] and delta.rows.tolist() == [6, 4, 3]
    assert delta.gone.tolist() == [9]


Edit = Callable[[dict[str, np.ndarray]], object]
BASE: list[Edit] = [
    lambda t: t["ids"].__setitem__(0, t["ids"][1]),
    lambda t: t["ids"].sort() or t.update(ids=t["ids"][::-1].copy()),
    lambda t: t["rows"].__setitem__(0, 2),
    lambda t: t["rows"].__setitem__(0, 23),
    lambda t: t["rows"].__setitem__(0, -1),
    lambda t: t["rows"].__setitem__(0, t["rows"][1]),
    lambda t: t.update(rows=t["rows"][1:]),
    lambda t: t.update(ids=t["ids"].astype(np.int32)),
    lambda t: t.update(gone=t["ids"][:0]),
    lambda t: t.pop("rows"),
]
DELTA: list[Edit] = [
    lambda t: t["gone"].__setitem__(0, 1000),
    lambda t: t["gone"].__setitem__(0, t["ids"][0]),
    lambda t: t.update(gone=np.repeat(t["gone"], 2)),
    lambda t: t["rows"].__setitem__(0, 3),
    lambda t: t["rows"].__setitem__(0, 99),
    lambda t: t["ids"].__setitem__(0, 2),
    lambda t: t.pop("gone"),
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str, SnapshotIds]]:
    """A base of twelve ids, and a delta in which one has come and another one gone."""
    root = tmp_path_factory.mktemp("chain")
    first = {i: i + 3 for i in range(12)}
    second = {i: row for i, row in first.items() if i != 5} | {77: 8}
    versions = [entry for _, entry, _ in written(root, [first, second])]
    return [(root / f"v{n}", "ids/0.safetensors", entry) for n, entry in enumerate(versions)]


@pytest.mark.parametrize(("number", "edit"), [*((0, e) for e in BASE), *((1, e) for e in DELTA)])
def test_what_contradicts_itself_is_refused(
    chain: list[tuple[Path, str, SnapshotIds]], tmp_path: Path, number: int, edit: Edit
) -> None:
    """Files by somebody who renews every digest."""
    copied = []
    for folder, path, entry in chain:
        shutil.copytree(folder, tmp_path / folder.name)
        copied.append((tmp_path / folder.name, path, entry))
    assert read_ids(copied, RULES).knows(np.array([77, 5])).tolist() == [True, False]
    file = copied[number][0] / copied[number][1]
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(SnapshotError):
        read_ids(copied, RULES)


def test_descriptions_that_do_not_fit_are_refused(chain: list[tuple[Path, str, SnapshotIds]]) -> None:
    (base, delta) = chain
    for changed in ({"live": 13}, {"base_live": 11}, {"set": 2}, {"gone": 0}):
        entry = delta[2].model_copy(update=changed)
        with pytest.raises(SnapshotError):
            read_ids([base, (*delta[:2], entry)], RULES)
    with pytest.raises(SnapshotError, match="names rows outside"):
        read_ids(chain, replace(RULES, capacity=11))
    for facts in ({"live": 21}, {"set": 1}, {"base_live": 3, "gone": 1}):
        with pytest.raises(ValueError):
            SnapshotIds(**{"capacity": 20, "shared_rows": 3, "live": 3, **facts})
