"""Tensors go into torch.distributed.checkpoint's files, and come out of them, a block of rows at a time.

DCP (torch 2.13) copies whatever it writes whose storage is larger than itself, which is every table that
shares the memory of a kernel with others, and keeps that copy until the file is written (`_SerialCpuLoader`
and `tensor_dict` in filesystem.py); and it reads every chunk whole before it copies it to its place. So a
save and a load took the memory of the tables twice. Here a shard is saved as several chunks of some rows
each, in the same format; each is written from where it lies; and a chunk of any size, also of checkpoints
that have one for a whole shard, is read in pieces.
"""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, WriteItem, WriteItemType
from torch.futures import Future

from trainer.checkpoint.store_files import StoreFiles

# Bytes of a chunk at most, unless one row has more.
BLOCK_BYTES = 1 << 26
# Bytes that are read at once.
PIECE_BYTES = 1 << 23
_HEADER_BYTES = 30  # of a file in a zip archive, before its name


class BlockPlanner(DefaultSavePlanner):
    """Plans chunks of some rows each.

    It leaves out row shards without rows: DCP knows a shard by where it begins, and the next shard begins in
    the same place, so that DCP took such a pair for two copies of one shard and kept only one of them.

    Args:
        block_bytes: of a chunk at most.
        on_host: whether a tensor lies in host memory; others than the default are for tests.
    """

    def __init__(
        self, block_bytes: int = BLOCK_BYTES, on_host: Callable[[Tensor], bool] = lambda tensor: tensor.is_cpu
    ) -> None:
        super().__init__()
        self._block_bytes, self._on_host = block_bytes, on_host
        # Chunk -> the chunk that DCP would have made, and the rows of that.
        self._blocks: dict[MetadataIndex, tuple[MetadataIndex, slice]] = {}
        self._host = torch.empty(0, dtype=torch.uint8)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[block for item in plan.items for block in self._cut(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        whole, rows = self._blocks.get(write_item.index, (write_item.index, None))
        tensor = self.lookup_object(whole).detach()
        return self._alone(tensor if rows is None else tensor[rows])

    def _cut(self, item: WriteItem) -> Iterator[WriteItem]:
        data = item.tensor_data
        if data is None:
            yield item
            return
        chunk, width = data.chunk, data.properties.dtype.itemsize
        if item.type == WriteItemType.SHARD and 0 in chunk.sizes:
            return
        if not chunk.sizes or chunk.sizes.numel() * width <= self._block_bytes:
            yield item
            return
        count, *row = chunk.sizes
        each = max(1, self._block_bytes // (torch.Size(row).numel() * width))
        first, *column = chunk.offsets
        for start in range(0, count, each):
            stop = min(start + each, count)
            offsets = torch.Size([first + start, *column])
            index = MetadataIndex(item.index.fqn, offsets)
            self._blocks[index] = item.index, slice(start, stop)
            part = replace(data, chunk=ChunkStorageMetadata(offsets, torch.Size([stop - start, *row])))
            yield WriteItem(index, WriteItemType.SHARD, tensor_data=part)

    def _alone(self, tensor: Tensor) -> Tensor:
        """The same numbers in host memory, with a storage of exactly their bytes, which DCP does not copy."""
        if not tensor.numel():
            return tensor
        if not self._on_host(tensor):
            # One buffer for all: a chunk is written before the next one is asked for.
            if self._host.numel() < tensor.nbytes:
                self._host = torch.empty(tensor.nbytes, dtype=torch.uint8)
            target = self._host[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            tensor = target.copy_(tensor)
        # As bytes, since numpy knows no bfloat16; what is made of numpy's memory has a storage of its size.
        raw = torch.from_numpy(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return raw.view(tensor.dtype).view(tensor.shape)


class PieceReader(FileSystemReader):
    """Reads large chunks piece by piece."""

    def __init__(self, path: Any, piece_bytes: int = PIECE_BYTES) -> None:
        super().__init__("")
        self.fs, self.path = StoreFiles(), path
        self._piece_bytes = piece_bytes

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        small: list[ReadItem] = []
        large: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            if item.type == LoadItemType.BYTE_IO or info.length <= self._piece_bytes:
                small.append(item)
            else:
                large.setdefault(info.relative_path, []).append(item)
        for name, items in large.items():
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "rb") as stream:
                for item in items:
                    info = self.storage_data[item.storage_index]
                    saved = _find(stream, info.offset, info.length)
                    if saved is None:
                        small.append(item)
                        continue
                    target = planner.resolve_tensor(item).detach()
                    _read(stream, saved, item, target, self._piece_bytes)
                    planner.commit_tensor(item, target)
        return super().read_data(LoadPlan(small), planner)


class _Saved(NamedTuple):
    """A tensor in a file: where its numbers begin, one row after the other."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype


def _find(stream: Any, offset: int, length: int) -> _Saved | None:
    """A tensor that `torch.save` wrote at a place of a file; None: it does not lie there row by row."""
    file = _Slice(stream, offset, length)
    with zipfile.ZipFile(file) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        order = archive.read(records["byteorder"]) if "byteorder" in records else b""
    file.seek(0)
    like = torch.load(cast(IO[bytes], file), map_location="meta", weights_only=True)
    info = records.get("data/0")
    plain = like.is_contiguous() and like.storage_offset() == 0 and order in (b"", sys.byteorder.encode())
    if not plain or info is None or (info.compress_type, info.file_size) != (zipfile.ZIP_STORED, like.nbytes):
        return None
    file.seek(info.header_offset)
    header = file.read(_HEADER_BYTES)
    # The lengths of the name and of what else stands before the content.
    names = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return _Saved(offset + info.header_offset + _HEADER_BYTES + names, like.shape, like.dtype)


def _read(stream: Any, saved: _Saved, item: ReadItem, target: Tensor, piece_bytes: int) -> None:
    """Fill `target` with the part of a saved tensor that an item asks for."""
    _, *row = saved.shape
    row_bytes = torch.Size(row).numel() * saved.dtype.itemsize
    at_once = max(1, piece_bytes // row_bytes)
    first, *others = item.storage_offsets
    count, *lengths = item.lengths
    if target.shape != item.lengths:
        raise AssertionError(f"{item.storage_index} is to be {item.lengths}, not {target.shape}")
    buffer = torch.empty(min(at_once, count) * row_bytes, dtype=torch.uint8)
    stream.seek(saved.begin + first * row_bytes)
    for start in range(0, count, at_once):
        rows = min(at_once, count - start)
        raw = buffer[: rows * row_bytes]
        _fill(stream, raw.numpy().data)
        piece = raw.view(saved.dtype).view(rows, *row)
        for dim, (begin, length) in enumerate(zip(others, lengths, strict=True), 1):
            piece = piece.narrow(dim, begin, length)
        target[start : start + rows].copy_(piece)


def _fill(stream: Any, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        read = stream.readinto(buffer[done:])
        if not read:
            raise OSError(f"ends {len(buffer) - done} bytes too early")
        done += read


class _Slice(io.RawIOBase):
    """A part of a file as a file; DCP's own cannot be read from its end, as archives are."""

    def __init__(self, stream: Any, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._at = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError(f"no place {self._at} in a file")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._length - self._at))
        if not wanted:
            return 0
        self._stream.seek(self._offset + self._at)
        read: int = self._stream.readinto(view[:wanted])
        self._at += read
        return read
