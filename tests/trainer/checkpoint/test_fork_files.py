"""What a checkpoint keeps of a fork comes back, to the bit, however the tables lie by then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embeddings.errors import CheckpointError
from embeddings.lookup.before_change import Rows
from embeddings.lookup.touched import ShardKey
from tests.helpers.touched_tables import STATE, WEIGHT, TouchedTable
from trainer.checkpoint import files, save_load
from trainer.checkpoint.background import Saver
from trainer.checkpoint.delta import row_parts
from trainer.checkpoint.fork_files import BASE, ForkFiles, Moment, copied, dense_tensors, read_moments
from trainer.config.sections import CheckpointConfig
from trainer.ranks.process_group import process_group


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with process_group(device="cpu"):
        yield


def moment_of(table: TouchedTable, ids: list[int]) -> Moment:
    """The table's rows as they are now."""
    rows: dict[ShardKey, Rows] = {}
    for key, parts in row_parts(table.tensors()).items():
        count = table.rows[key]
        mine = torch.tensor([each - key.row for each in ids if key.row <= each < key.row + count]).long()
        if len(mine):
            rows[key] = Rows(mine, tuple(part.tensor[mine].clone() for part in parts.values()))
    return Moment(rows, copied(dense_tensors(table.tensors())))


def laid_over(table: TouchedTable, moments: list[Moment]) -> dict[str, Tensor]:
    """What the table holds once the rows of moments are put into it."""
    parts = row_parts(table.tensors())
    for moment in moments:
        for key, rows in moment.rows.items():
            for part, values in zip(parts[key].values(), rows.parts, strict=True):
                part.tensor[rows.ids] = values
    return {name: each for name, each in table.contents().items() if name in (STATE, f"model.{WEIGHT}")}


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_moments_come_back_over_other_shards(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows, width = data.draw(st.integers(2, 90)), data.draw(st.integers(1, 5))
    columns, dtype = data.draw(st.integers(1, width)), data.draw(st.sampled_from([torch.float32, torch.half]))
    table = TouchedTable(rows, width, data.draw(st.integers(1, rows)), columns, dtype)
    some = st.lists(st.integers(0, rows - 1), unique=True, max_size=rows).map(sorted)
    touched = data.draw(some)
    moments, expected = {BASE: moment_of(table, touched)}, {BASE: laid_over(table, [])}
    for name in ("0", "1"):
        changed = [each for each in touched if data.draw(st.booleans())]
        table.touch(torch.tensor(changed, dtype=torch.int64))
        moments[name], expected[name] = moment_of(table, changed), laid_over(table, [])
        laid_over(table, [moments[BASE]])
    folder = tmp_path_factory.mktemp("fork")
    kept = ForkFiles(moments, row_parts(table.tensors()))
    path = save_load.save(folder, 3, table.tensors(), {"step": 3}, 9, besides=[kept.write])
    other = TouchedTable(rows, width, data.draw(st.integers(1, rows)), columns, dtype)
    parts, dense = row_parts(other.tensors()), dense_tensors(other.tensors())
    found = read_moments(path, list(moments), parts, other.rows, dense)
    for name, moment in found.items():
        assert moment.dense.keys() == moments[name].dense.keys()
        for each, tensor in moment.dense.items():
            assert torch.equal(tensor, moments[name].dense[each])
        other.zero()
        save_load.load_tensors(path, other.tensors(), distributed=False)
        laid = laid_over(other, [moment])
        assert all(torch.equal(laid[each], whole) for each, whole in expected[name].items())


def test_what_became_whole_since_is_refused_by_its_name(tmp_path: Path) -> None:
    table = TouchedTable(9, 2, 4, 2, torch.float32)
    kept = ForkFiles({BASE: moment_of(table, [1, 2])}, row_parts(table.tensors()))
    with Saver(tmp_path, CheckpointConfig(mode="async"), lambda line: None) as saver:
        saver.save(1, table.tensors(), {"step": 1}, besides=[kept.write])
        saver.settle(last=True)
    path = tmp_path / files.final_name(1)
    dense = {**dense_tensors(table.tensors()), "model.other": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"model\.other differs.*become data-parallel"):
        read_moments(path, [BASE], row_parts(table.tensors()), table.rows, dense)
    with (path / "fork-dense.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"?")
    with pytest.raises(CheckpointError, match="corrupt"):
        save_load.verify(path)
