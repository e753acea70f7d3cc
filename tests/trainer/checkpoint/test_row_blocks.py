"""Tensors are written and read a block of rows at a time, whatever their shards, in DCP's own format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from torch.distributed.checkpoint import FileSystemReader

from trainer.checkpoint import row_blocks
from trainer.checkpoint.row_blocks import BlockPlanner, PieceReader, _find
from trainer.checkpoint.tensors import TensorReader
from trainer.checkpoint.writer import HashedWriter
from trainer.ranks.process_group import process_group


def sharded(whole: Tensor, rows: int, columns: int) -> Any:
    """A tensor whose shards lie in one storage, as those of a kernel do."""
    parts = [
        (piece.contiguous(), [first * rows, second * columns] if whole.dim() > 1 else [first * rows])
        for first, band in enumerate(whole.split(rows))
        for second, piece in enumerate(band.split(columns, 1) if whole.dim() > 1 else [band])
    ]
    memory = torch.cat([part.view(-1) for part, _ in parts])
    views = memory.split([part.numel() for part, _ in parts])
    shards = [
        Shard.from_tensor_and_offsets(view.view(part.shape), place, 0)
        for view, (part, place) in zip(views, parts, strict=True)
    ]
    return init_from_local_shards(shards, *whole.shape)


def write(folder: Path, tensors: dict[str, Any], block_bytes: int) -> HashedWriter:
    writer = HashedWriter(folder)
    dcp.save(tensors, storage_writer=writer, planner=BlockPlanner(block_bytes))
    return writer


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_shards_in_any_blocks_come_back_in_any_shards(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    block, piece = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    cuts = [(data.draw(st.integers(1, count)), data.draw(st.integers(1, width))) for _ in range(2)]
    whole, row = torch.randn(count, width).to(dtype), torch.randn(count)
    plain = torch.randn(count, width).to(dtype)
    folder = tmp_path_factory.mktemp("blocks")
    with process_group():
        saved = {"table": sharded(whole, *cuts[0]), "state": sharded(row, *cuts[0]), "plain": plain}
        write(folder, saved, block)
        (folder / "state.json").write_text("{}")
        zero = torch.zeros_like
        target = {"table": sharded(zero(whole), *cuts[1]), "state": sharded(zero(row), *cuts[1])}
        target["plain"] = zero(plain)
        # DCP's reader is the reference.
        for reader in (PieceReader(folder, piece), FileSystemReader(folder)):
            dcp.load(target, storage_reader=reader)
            expected = {"table": sharded(whole, *cuts[1]), "state": sharded(row, *cuts[1])}
            for name, tensor in expected.items():
                pairs = zip(target[name].local_shards(), tensor.local_shards(), strict=True)
                assert all(torch.equal(one.tensor, other.tensor) for one, other in pairs)
            assert torch.equal(target["plain"], plain)
            for tensor in target["plain"], *(s.tensor for s in target["table"].local_shards()):
                tensor.zero_()
    tables = TensorReader(folder)
    for name, tensor in (("table", whole), ("state", row), ("plain", plain)):
        bands = list(tables.bands(name, piece))
        assert [first for first, _ in bands] == sorted({first for first, _ in bands})
        assert torch.equal(torch.cat([rows for _, rows in bands]), tensor)
        row_bytes = tensor[0].nbytes
        assert all(rows.nbytes <= max(piece, row_bytes) for _, rows in bands)


def test_small_tensors_are_written_as_ever(tmp_path: Path) -> None:
    with process_group():
        tensors = {
            "table": sharded(torch.randn(50, 4), 20, 2),
            "dense": torch.randn(3, 3),
            "x": torch.ones(()),
        }
        ours = write(tmp_path / "ours", tensors, 1 << 20).files.entries
        theirs = HashedWriter(tmp_path / "theirs")
        dcp.save(tensors, storage_writer=theirs)
    file = "__0_0.distcp"
    assert ours[file] == theirs.files.entries[file]


def test_neither_a_save_nor_a_load_holds_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    whole = torch.randn(6 << 15, 8)
    with process_group():
        tensors = {"table": sharded(whole, 3 << 15, 8)}
        planner = BlockPlanner(1 << 18)
        dcp.save(tensors, storage_writer=HashedWriter(tmp_path), planner=planner)
        planner.set_up_planner(tensors)
        plan = planner.create_local_plan()
        memory = tensors["table"].local_shards()[0].tensor
        low, high = memory.data_ptr(), memory.data_ptr() + 2 * memory.nbytes
        for item in plan.items:
            block = planner.resolve_data(item)
            assert low <= block.data_ptr() < high
            assert block.untyped_storage().nbytes() == block.nbytes <= 1 << 18
        assert len(plan.items) == 2 * -(-memory.nbytes // (1 << 18))
        read, fill = list[int](), row_blocks._fill

        def noting(stream: Any, buffer: memoryview) -> None:
            read.append(len(buffer))
            fill(stream, buffer)

        monkeypatch.setattr(row_blocks, "_fill", noting)
        dcp.load(tensors, storage_reader=PieceReader(tmp_path, 1 << 16))
    assert sum(read) == whole.nbytes and max(read) == 1 << 16


def test_other_layouts_are_left_to_torch() -> None:
    for tensor in (torch.randn(64, 4).t(), torch.randn(64, 8)[:, :4], torch.randn(64, 4)[8:]):
        file = io.BytesIO()
        file.write(b"before")
        torch.save(tensor, file)
        assert _find(file, 6, file.tell() - 6) is None
    file = io.BytesIO()
    torch.save(torch.arange(12.0).view(3, 4), file)
    saved = _find(file, 0, file.tell())
    assert saved is not None and saved.shape == (3, 4)
    assert file.getvalue()[saved.begin :][:8] == torch.arange(2.0).numpy().tobytes()


def test_blocks_of_a_device_go_through_one_buffer(tmp_path: Path) -> None:
    """DCP keeps what it was given last of each tensor until the file is written."""
    tables = {f"table {number}": torch.randn(1_000, 4) for number in range(3)}
    with process_group():
        tensors = {name: sharded(table, 600, 4) for name, table in tables.items()}
        planner = BlockPlanner(4_000, on_host=lambda tensor: False)
        dcp.save(tensors, storage_writer=HashedWriter(tmp_path), planner=planner)
        places = {planner.resolve_data(item).data_ptr() for item in planner.plan.items}
        assert len(places) == 1 and planner._host.numel() == 4_000
    (tmp_path / "state.json").write_text("{}")
    for name, table in tables.items():
        assert torch.equal(TensorReader(tmp_path).whole(name), table)
