"""Incremental checkpoints: base and deltas together are what a full save would have been, or are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embeddings.errors import CheckpointError
from embeddings.lookup.touched import empty_bits, mark
from tests.helpers.checkpoints import newest
from tests.helpers.touched_tables import STATE, WEIGHT, TouchedTable
from trainer.checkpoint import background, files, save_load
from trainer.checkpoint.background import Saver
from trainer.checkpoint.delta import TouchedShard
from trainer.checkpoint.tensors import TensorReader
from trainer.config.sections import CheckpointConfig
from trainer.ranks.process_group import process_group


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with process_group(device="cpu"):
        yield


def saver_of(folder: Path, table: TouchedTable, full_every: int, mode: str = "sync", keep: int = 99) -> Saver:
    config = CheckpointConfig(mode=mode, keep=keep, full_every=full_every)  # type: ignore[arg-type]
    return Saver(folder, config, lambda line: None, touched=table)  # type: ignore[arg-type]


def run(folder: Path, table: TouchedTable, saver: Saver, touched: list[list[int]]) -> list[dict[str, Tensor]]:
    """Touch rows and save, again and again; -> what the table held at each save."""
    held = []
    for step, ids in enumerate(touched, 1):
        table.touch(torch.tensor(ids, dtype=torch.int64))
        held.append(table.contents())
        saver.save(step, table.tensors(), {"step": step})
    saver.settle(last=True)
    return held


def base_names(folder: Path) -> dict[str, str | None]:
    paths = sorted(files.checkpoints(folder))
    return {path.name[-2:]: (files.read_state(path).get("base") or {}).get("name") for path in paths}


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_base_and_deltas_are_bit_equal_to_a_full_save(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, width = data.draw(st.integers(2, 90)), data.draw(st.integers(1, 5))
    cut_rows, columns = data.draw(st.integers(1, rows)), data.draw(st.integers(1, width))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    # Less than half of the rows, beyond which a save is full.
    some = st.lists(st.integers(0, rows - 1), max_size=rows // 4)
    touched = data.draw(st.lists(some, min_size=2, max_size=5))
    every, mode = data.draw(st.integers(2, 5)), data.draw(st.sampled_from(["sync", "async"]))
    folder = tmp_path_factory.mktemp("chain")
    table = TouchedTable(rows, width, cut_rows, columns, dtype)
    held = run(folder, table, saver_of(folder, table, every, mode), touched)
    assert sum(base is None for base in base_names(folder).values()) == -(-len(touched) // every)
    other = TouchedTable(rows, width, data.draw(st.integers(1, rows)), columns, dtype)
    for step, expected in enumerate(held, 1):
        point = save_load.find(folder / "nothing", alone=True)
        assert point.path is None
        path = folder / files.final_name(step)
        other.zero()
        save_load.load_tensors(path, other.tensors(), distributed=False)
        reader = TensorReader(path)
        for name, tensor in expected.items():
            assert torch.equal(other.contents()[name], tensor), name
            bands = list(reader.bands(name, 64))
            assert torch.equal(torch.cat([band for _, band in bands]), tensor), name


@given(rows=st.integers(1, 3000), data=st.data())
@settings(max_examples=50, deadline=None)
def test_marks_are_the_rows_that_were_looked_up(rows: int, data: st.DataObject) -> None:
    ids = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=50)), dtype=torch.int64)
    for waits in (True, False):
        bits = empty_bits(rows)
        for part in ids.split(7):
            mark(bits, part, waits)
        shard = TouchedShard("t", 0, bits, {})
        found = list(shard.ids())
        assert sorted(set(ids.tolist())) == (torch.cat(found).tolist() if found else [])
        assert shard.count == len(set(ids.tolist()))


def sparse(folder: Path, **how: object) -> tuple[TouchedTable, Saver, list[dict[str, Tensor]]]:
    """Six saves of a large table, of which each second or third is full, and few rows touched in each."""
    table = TouchedTable(40_000, 4, 25_000, 4, torch.float16)
    saver = saver_of(folder, table, **{"full_every": 3, **how})  # type: ignore[arg-type]
    return table, saver, run(folder, table, saver, [[7 * n, 39_000 + n, 5] for n in range(6)])


def test_the_cost_follows_the_touched_rows(tmp_path: Path) -> None:
    sparse(tmp_path)
    assert base_names(tmp_path) == {
        "01": None, "02": "step-00000001", "03": "step-00000002",
        "04": None, "05": "step-00000004", "06": "step-00000005",
    }  # fmt: skip

    def rows_bytes(step: int) -> int:
        entries = files.read_manifest(tmp_path / files.final_name(step))
        return sum(
            entry["bytes"] for name, entry in entries.items() if name not in (".metadata", "state.json")
        )

    # 40,000 rows of 8 bytes and a state of 4; a row of a delta has its id besides.
    assert rows_bytes(4) > 40_000 * 12
    for step in (2, 3, 5, 6):
        assert rows_bytes(step) < 6_000
    few, many = TouchedTable(40_000, 4, 25_000, 4, torch.float16), [list(range(0, 40_000, 5))]
    run(tmp_path / "more", few, saver_of(tmp_path / "more", few, 3), [[1], *many])
    entry = files.read_manifest(tmp_path / "more" / files.final_name(2))["delta-00000.safetensors"]
    assert 8_000 * 20 <= entry["bytes"] < 8_000 * 20 + 2_000


def test_where_most_rows_were_touched_a_save_is_full(tmp_path: Path) -> None:
    table = TouchedTable(100, 4, 60, 4, torch.float32)
    run(tmp_path, table, saver_of(tmp_path, table, 9), [[1], list(range(80)), [2]])
    assert base_names(tmp_path) == {"01": None, "02": None, "03": "step-00000002"}


@pytest.mark.parametrize("harm", ["rows", "base", "base is gone", "base is another", "state"])
def test_a_broken_chain_falls_back_to_the_newest_that_verifies(tmp_path: Path, harm: str) -> None:
    _, _, held = sparse(tmp_path)
    four, five, six = (tmp_path / files.final_name(step) for step in (4, 5, 6))
    spare = tmp_path / "spare"
    table = TouchedTable(40_000, 4, 25_000, 4, torch.float16)
    table.touch(torch.tensor([9]))

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    def replace() -> None:
        other = save_load.save(spare, 4, table.tensors(), {"step": 4}, 9)
        shutil.rmtree(four)
        other.rename(four)

    expected, said = {
        "rows": (four, "step-00000005/delta-00000.safetensors"),
        "base": (tmp_path / files.final_name(3), "step-00000004/__0_0.distcp"),
        "base is gone": (tmp_path / files.final_name(3), "builds on step-00000004: No such file"),
        "base is another": (four, "builds on another step-00000004 than is there now"),
        "state": (five, "step-00000006/state.json"),
    }[harm]
    {
        "rows": lambda: flip(five / "delta-00000.safetensors"),
        "base": lambda: flip(four / "__0_0.distcp"),
        "base is gone": lambda: shutil.rmtree(four),
        "base is another": replace,
        "state": lambda: flip(six / "state.json"),
    }[harm]()
    for path, refused in (newest(tmp_path), _find(tmp_path)):
        assert path == expected and refused
        assert any(said in line for line in refused), refused
        assert six.name in refused[0]
    found = TensorReader(expected).whole(STATE)
    step = int(expected.name[-8:])
    assert harm == "base is another" or torch.equal(found, held[step - 1][STATE])


def _find(folder: Path) -> tuple[Path | None, list[str]]:
    point = save_load.find(folder)
    return point.path, point.refused


def test_what_a_kept_delta_builds_on_stays(tmp_path: Path) -> None:
    sparse(tmp_path, keep=1)
    # The newest, step 6, and its chain.
    assert list(base_names(tmp_path)) == ["04", "05", "06"]
    assert newest(tmp_path) == (tmp_path / files.final_name(6), [])
    table, saver, _ = sparse(tmp_path / "best", keep=1)
    table.touch(torch.tensor([3]))
    saver.save(7, table.tensors(), {"step": 7}, best=5)
    saver.settle(last=True)
    assert list(base_names(tmp_path / "best")) == ["04", "05", "07"]
    other, again = TouchedTable(400, 4, 300, 4, torch.float16), tmp_path / "again"
    saver = saver_of(again, other, 2, keep=1)
    for step in range(1, 6):
        other.touch(torch.tensor([step]))
        saver.save(step, other.tensors(), {"step": step}, best=2)
    saver.settle(last=True)
    assert list(base_names(again)) == ["01", "02", "05"]


def test_after_a_failed_save_the_next_one_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TouchedTable(400, 4, 300, 4, torch.float16)
    saver = saver_of(tmp_path, table, 9)
    run(tmp_path, table, saver, [[1], [2]])
    with monkeypatch.context() as patch:
        patch.setattr(save_load, "write_rows", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        table.touch(torch.tensor([3]))
        with pytest.raises(CheckpointError, match=r"No space left.*older checkpoints are untouched"):
            saver.save(3, table.tensors(), {"step": 3})
    table.touch(torch.tensor([4]))
    saver.save(4, table.tensors(), {"step": 4})
    saver.settle(last=True)
    assert base_names(tmp_path) == {"01": None, "02": "step-00000001", "04": None}
    whole = table.contents()
    assert torch.equal(TensorReader(tmp_path / files.final_name(4)).whole(STATE), whole[STATE])


def test_auto_asks_for_deltas_and_full_saves_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start the first save may be a delta, whose copy says nothing of that of all tables."""
    table, _, _ = sparse(tmp_path)
    lines: list[str] = []
    monkeypatch.setattr(background, "free_memory_bytes", lambda: 100_000)
    config = CheckpointConfig(full_every=3, keep=99)
    saver = Saver(tmp_path, config, lines.append, touched=table)  # type: ignore[arg-type]
    saver.follow(tmp_path / files.final_name(6), 1)
    expected = [(7, "step-00000006", True), (8, None, False), (9, "step-00000008", True)]
    for step, base, in_background in expected:
        table.touch(torch.tensor([step]))
        saver.save(step, table.tensors(), {"step": step})
        assert (saver._running is not None) == in_background
        saver.settle(last=True)
        assert base_names(tmp_path)[f"0{step}"] == base
    kinds = [line.partition("step-0000000")[2] for line in lines if line.startswith("checkpoint /")]
    assert kinds == ["7, incremental", "8", "9, incremental"]
    assert [line.split(";")[0] for line in lines if "checkpoint.mode" in line] == [
        'checkpoint.mode = "auto": sync, training waits for each save'
    ]


def test_auto_asks_again_where_nothing_stays_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between full saves somebody else may take the memory, and may give it back."""
    table, lines = TouchedTable(400, 4, 300, 4, torch.float16), list[str]()
    free = iter([10**9, 1_000, 10**9])
    monkeypatch.setattr(background, "free_memory_bytes", lambda: next(free))
    config = CheckpointConfig(full_every=2, keep=99)
    saver = Saver(tmp_path, config, lines.append, touched=table)  # type: ignore[arg-type]
    for step, in_background in ((1, True), (2, False), (3, True)):
        # All rows, so that each save is full.
        table.touch(torch.arange(300))
        saver.save(step, table.tensors(), {"step": step})
        assert (saver._running is not None) == in_background
        saver.settle(last=True)
    assert list(base_names(tmp_path).values()) == [None] * 3
    modes = [line.split(": ")[1].split(",")[0] for line in lines if "checkpoint.mode" in line]
    assert modes == ["async", "sync", "async"]


def test_a_start_from_a_checkpoint_goes_on_with_its_chain(tmp_path: Path) -> None:
    table, _, _ = sparse(tmp_path)
    for base, links, expected in ((6, 1, "step-00000006"), (6, 2, None), (None, 0, None)):
        saver = saver_of(tmp_path, table, 3)
        saver.follow(None if base is None else tmp_path / files.final_name(base), links)
        table.touch(torch.tensor([11]))
        saver.save(8, table.tensors(), {"step": 8})
        saver.settle(last=True)
        assert base_names(tmp_path)["08"] == expected
        shutil.rmtree(tmp_path / files.final_name(8))


def test_a_step_that_is_there_already_is_no_base(tmp_path: Path) -> None:
    """Its rows may have been rounded otherwise: on other ranks, say."""
    table, saver, _ = sparse(tmp_path)
    saver.save(6, table.tensors(), {"step": 6})
    table.touch(torch.tensor([11]))
    saver.save(7, table.tensors(), {"step": 7})
    saver.settle(last=True)
    assert base_names(tmp_path)["07"] is None


def test_a_reader_knows_what_was_touched_since(tmp_path: Path) -> None:
    sparse(tmp_path)
    reader = TensorReader(tmp_path / files.final_name(6))
    expected = {6: [], 5: [5, 35, 39_005], 4: [5, 28, 35, 39_004, 39_005]}
    for step, rows in expected.items():
        found = reader.touched_since(WEIGHT, step)
        assert found is not None
        assert [row for ids in found for row in ids.tolist()] == rows
    # What a full one changed is not known, nor what lies before.
    assert reader.touched_since(WEIGHT, 3) is None
    assert TensorReader(tmp_path / files.final_name(4)).touched_since(WEIGHT, 1) is None


def test_rows_that_are_cut_off_are_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    sparse(tmp_path)
    reader = TensorReader(tmp_path / files.final_name(6))
    found = reader.touched_since(WEIGHT, 5)
    file = next((tmp_path / files.final_name(6)).glob("delta-*"))
    assert found is not None
    os.truncate(file, 8 + int.from_bytes(file.read_bytes()[:8], "little"))
    with pytest.raises(CheckpointError, match=rf"{file.name}: cannot be read: ends at byte"):
        list(found)


@pytest.mark.parametrize(
    "entry", [{"name": "../x"}, {"name": "step-00000009"}, {"sha256": None, "links": "x"}]
)
def test_a_state_cannot_name_another_place(tmp_path: Path, entry: dict[str, object]) -> None:
    sparse(tmp_path)
    path = tmp_path / files.final_name(6)
    state = files.read_state(path)
    state["base"] |= entry
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"cannot build on|does not say what it builds on"):
        TensorReader(path)
