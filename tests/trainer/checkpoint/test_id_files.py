"""Maps of ids in checkpoints and beside plain tables: written by some ranks, read by any number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import CheckpointError
from embeddings.ids.bucket_map import Sightings
from embeddings.ids.hashing import hashed
from embeddings.ids.rules import IdRules, owner_of
from embeddings.ids.stage import IdStage
from trainer.checkpoint.id_files import IdFiles, SavedMaps, frozen_ids, read_stage
from trainer.checkpoint.plain_ids import check_ids, take_ids, write_ids
from trainer.sealed_folder import entry_of

RULES = {
    "item_id": IdRules(capacity=200, shared_rows=3, admission="count", admit_count=2),
    "tag": IdRules(capacity=70, shared_rows=1, eviction="lfu"),
}


def staged(ranks: int, seed: int = 0) -> list[IdStage]:
    """Stages of several ranks, as if a few steps were trained, without any exchange."""
    rng = np.random.default_rng(seed)
    stages = [IdStage(RULES, rank, ranks) for rank in range(ranks)]
    for step in range(1, 4):
        for name, rules in RULES.items():
            ids = np.unique(rng.integers(-300, 300, 150))
            seen = Sightings(ids, rng.integers(1, 3, ids.size), rng.integers(0, 99, ids.size))
            owner = owner_of(rules.buckets, rules.bucket(hashed(ids)), ranks)
            for rank, stage in enumerate(stages):
                mine = owner == rank
                part = Sightings(ids[mine], seen.counts[mine], seen.newest[mine])
                stage.maps[name].take(part, 99, step, False, None)
    for stage in stages:
        stage.clock[:] = 99, 3
    return stages


def written(folder: Path, stages: list[IdStage]) -> Path:
    folder.mkdir()
    for rank, stage in enumerate(stages):
        (entry,) = IdFiles.of(stage).write(folder, rank).items()
        assert entry == (f"ids-{rank:05d}.safetensors", entry_of(folder / entry[0]))
    return folder


def states(stage: IdStage) -> dict[str, Any]:
    arrays = {
        f"{name}/{key}": array.tolist()
        for name, each in stage.maps.items()
        for key, array in each.state().items()
    }
    return {"clock": stage.clock.tolist(), **arrays}


@settings(max_examples=12)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_any_number_of_ranks_reads_what_any_number_wrote(
    tmp_path_factory: pytest.TempPathFactory, before: int, after: int, seed: int
) -> None:
    folder = written(tmp_path_factory.mktemp("ids") / "a", staged(before, seed))
    for rank, expected in enumerate(staged(after, seed)):
        stage = IdStage(RULES, rank, after)
        assert read_stage(folder, stage) == []
        assert states(stage) == states(expected)


def test_one_process_reads_whole_maps(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", staged(3))
    (whole,) = staged(1)
    for name, found in frozen_ids(folder, RULES).items():
        ids, rows = whole.maps[name].entries()
        assert found.ids.tolist() == ids.tolist() and found.rows.tolist() == rows.tolist()
        wanted = np.arange(-400, 400)
        assert found.look_up(wanted).tolist() == whole.maps[name].look_up(wanted).tolist()


def test_plain_maps_keep_rows_and_ages(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", staged(2))
    (tmp_path / "plain").mkdir()
    known = write_ids(folder, tmp_path / "plain")
    assert known["tag"].live == staged(1)[0].maps["tag"].live > 0
    check_ids(tmp_path, known, RULES)
    for rank in range(3):
        stage, expected = IdStage(RULES, rank, 3), staged(3)[rank]
        assert len(take_ids(tmp_path / "plain", known, stage)) == 2
        for name, own in stage.maps.items():
            for key in ("marks", "keys", "last", "uses"):
                assert own.state()[key].tolist() == expected.maps[name].state()[key].tolist()
        assert stage.clock.tolist() == [99, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({**RULES, "word": RULES["tag"]}, "word stay what they are, and ids.word is set here"),
        ({"tag": RULES["tag"]}, "item_id come and go, and here they do not"),
        ({**RULES, "tag": replace(RULES["tag"], capacity=71)}, "capacity = 70, here it is 71"),
    ],
)
def test_a_source_with_other_maps_is_refused(
    tmp_path: Path, changed: dict[str, IdRules], message: str
) -> None:
    known = write_ids(written(tmp_path / "a", staged(1)), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_ids(tmp_path, known, changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"word": RULES["tag"]}, "no map of the ids of word, which ids.word asks for"),
        ({"tag": replace(RULES["tag"], shared_rows=2)}, "shared_rows = 1, by ids.tag it is 2 now"),
        ({"tag": replace(RULES["tag"], capacity=99)}, "capacity = 70, by ids.tag it is 99 now"),
    ],
)
def test_a_checkpoint_with_other_rows_is_refused(
    tmp_path: Path, changed: dict[str, IdRules], message: str
) -> None:
    folder = written(tmp_path / "a", staged(2))
    with pytest.raises(CheckpointError, match=message):
        read_stage(folder, IdStage(changed))
    with pytest.raises(CheckpointError, match=message):
        frozen_ids(folder, changed)


def test_a_checkpoint_without_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it was trained without: leave ids.tag out"):
        read_stage(tmp_path, IdStage({"tag": RULES["tag"]}))
    assert frozen_ids(tmp_path, {}) == {} and SavedMaps.open(tmp_path).rules() == {}


def test_another_admission_begins_anew_and_rows_stay(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", staged(2))
    stage = IdStage({"item_id": replace(RULES["item_id"], counter="sketch")})
    assert read_stage(folder, stage) == [
        "ids.item_id: admission was count exact and is count sketch 1048576 now, and begins anew"
    ]
    read_stage(folder, whole := IdStage(RULES))
    expected = whole.maps["item_id"]
    assert stage.maps["item_id"].entries()[1].tolist() == expected.entries()[1].tolist()


def test_a_header_of_a_later_version_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", staged(1))
    file = folder / "ids-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"version": "1"', b'"version": "2"'))
    with pytest.raises(CheckpointError, match=r"ids-00000.safetensors: its header .* of version 2"):
        SavedMaps.open(folder)
