"""The copy of the shards that a save writes; a stand-in for the device shows what would be pinned."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings.errors import CheckpointError
from trainer.checkpoint import background as saving
from trainer.checkpoint.background import Saver
from trainer.checkpoint.staging import StagedCopy, device_of
from trainer.checkpoint.writer import HashedWriter
from trainer.config.sections import CheckpointConfig
from trainer.ranks.process_group import process_group

PAGE = 4096


class Device:
    """Stands in for CUDA: tensors of float32 lie on it; notes what is asked of it."""

    def __init__(self, memory: int = 1 << 40) -> None:
        self.locked: dict[int, int] = {}
        self.waits, self.memory = 0, memory

    def pin(self, address: int, size: int) -> None:
        # What CUDA does: a page is locked once, and memory is limited.
        for begin, length in self.locked.items():
            assert address + size <= begin // PAGE * PAGE or begin + length <= address // PAGE * PAGE
        if sum(self.locked.values()) + size > self.memory:
            raise RuntimeError("Registering memory failed with cudaError: 2.")
        self.locked[address] = size

    def unpin(self, address: int) -> None:
        del self.locked[address]

    def wait(self, device: torch.device) -> None:
        self.waits += 1

    def copy(self) -> StagedCopy:
        return StagedCopy(lambda tensor: tensor.dtype == torch.float32, self.pin, self.unpin, self.wait)


class Copies(TorchDispatchMode):
    """Notes every operator that copies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in str(func) or "clone" in str(func):
            self.seen.append((str(func), args[0].nbytes))
            assert kwargs.get("non_blocking") or (len(args) > 2 and args[2]), "each would be waited for"
        return func(*args, **(kwargs or {}))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_pinned_memory_is_as_large_as_the_shards_and_copied_to_once() -> None:
    device = Device()
    copy = device.copy()
    # Not a power of two, and a row of a larger storage, as the tables of one kernel are.
    storage = torch.randn(3, 300_001)
    tree = {
        "a": storage[1],
        "small": torch.randn(7),
        "ids": torch.arange(1_000_000),
        "b": torch.randn(270_001),
    }
    copy.make_room(tree)
    assert sorted(device.locked.values()) == [4 * 270_001, 4 * 300_001]
    with Copies() as copies:
        taken = copy.take(tree)
    assert [size for _, size in copies.seen] == [tensor.nbytes for tensor in tree.values()]
    assert equal(taken, tree) and device.waits == 1
    # DCP clones a tensor that is a part of a larger storage, in which each shard would be copied again.
    assert all(part.untyped_storage().size() == part.nbytes for part in taken.values())
    addresses = {part.data_ptr() for part in taken.values()}
    assert set(device.locked) < addresses
    again = copy.take({**tree, "a": storage[2]})
    assert {part.data_ptr() for part in again.values()} == addresses and device.waits == 2
    assert torch.equal(again["a"], storage[2])
    copy.close()
    assert not device.locked and torch.equal(again["b"], tree["b"]), "a save under way may still read it"


def test_nothing_is_pinned_for_tensors_in_host_memory() -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("asked CUDA")

    copy = StagedCopy(pin=fail, unpin=fail, wait=fail)
    tree = {"a": torch.randn(600_000)}
    assert device_of(tree) is None
    copy.make_room(tree)
    assert equal(copy.take(tree), tree)
    copy.close()


LEAVES = st.one_of(
    st.integers(),
    st.text(max_size=3),
    st.none(),
    st.builds(
        lambda shape, dtype, seed: torch.randn(
            shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).to(dtype),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool]),
        st.integers(0, 99),
    ),
)
TREES = st.dictionaries(
    st.text(max_size=3),
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=8,
    ),
)


@given(TREES)
def test_a_copy_is_equal_and_nobody_elses(tree: dict[str, Any]) -> None:
    """Against `copy.deepcopy`: changed tensors change neither copy."""
    import copy as reference

    deep, host = reference.deepcopy(tree), StagedCopy()
    host.make_room(tree)
    taken = host.take(tree)
    assert equal(taken, deep)

    def spoil(part: Any) -> None:
        if isinstance(part, Tensor):
            part.fill_(1)
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            spoil(inner)

    spoil(tree)
    assert equal(taken, deep)


def sharded(values: Tensor, place: str) -> ShardedTensor:
    metadata = ShardMetadata([0, 0], list(values.shape), place)
    return ShardedTensor._init_from_local_shards([Shard(values, metadata)], list(values.shape))


def test_shards_of_a_device_get_a_place_on_the_host() -> None:
    """On the meta device, which stands in for CUDA: a placement there does not suit a tensor here."""
    with process_group(device="cpu"):
        there = sharded(torch.empty(300, 1000, device="meta"), "rank:0/meta")
        here = sharded(torch.randn(300, 1000), "rank:0/cpu")
        device = Device()
        copy = device.copy()
        copy.make_room({"table": there, "lr": 0.1})
        (room,) = copy._leaves
        assert isinstance(room, ShardedTensor) and list(device.locked.values()) == [1_200_000]
        assert str(room.metadata().shards_metadata[0].placement) == "rank:0/cpu"
        taken = copy.take({"table": here, "lr": 0.2})
        assert taken["lr"] == 0.2 and taken["table"] is room
        assert torch.equal(taken["table"].local_shards()[0].tensor, here.local_shards()[0].tensor)


def test_shards_without_rows_begin_where_others_do() -> None:
    """A rank may hold both, as with grid_shard and fewer rows than ranks."""
    with process_group(device="cpu"):
        values = torch.randn(3, 4)
        pieces = [(values[:0], [0, 0]), (values, [0, 0])]
        shards = [Shard(part, ShardMetadata(begin, list(part.shape), "rank:0/cpu")) for part, begin in pieces]
        whole = ShardedTensor._init_from_local_shards([shards[1]], [3, 4])
        metadata = replace(whole.metadata(), shards_metadata=[shard.metadata for shard in shards])
        spec = EnumerableShardingSpec([shard.metadata for shard in shards])
        both = ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata, sharding_spec=spec)
        tree = {"table": both}
        copy = StagedCopy()
        copy.make_room(tree)
        first, second = copy.take(tree)["table"].local_shards()
        assert first.tensor.shape == (0, 4) and torch.equal(second.tensor, values)


def test_memory_that_cannot_be_locked_is_one_clear_error(tmp_path: Path) -> None:
    with process_group(device="cpu"):
        saver = Saver(tmp_path, CheckpointConfig(mode="async"), print)
        saver._copy = Device(memory=1_500_000).copy()
        with pytest.raises(
            CheckpointError, match=r"1\.2 MB cannot be page-locked.*checkpoint\.mode = \"sync\""
        ):
            saver.save(1, {"a": torch.randn(300_000), "b": torch.randn(300_000)}, {})


@pytest.mark.parametrize(
    ("free", "lockable", "mode", "said"),
    [
        (
            9_000_000,
            None,
            "async",
            "async, training goes on .* needs a copy of 2.4 MB .*, and 4.5 MB are free",
        ),
        (5_200_000, None, "sync", "sync, training waits .* needs a copy of 2.4 MB .*, and 2.6 MB are free"),
        (9_000_000, 1_500_000, "sync", "sync, training waits .*1.2 MB cannot be page-locked"),
    ],
)
def test_auto_saves_in_the_background_where_a_copy_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, lockable: int | None, mode: str, said: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(saving, "free_memory_bytes", lambda: free)
    tensors = {"a": torch.randn(300_000), "b": torch.randn(300_000)}
    with process_group(device="cpu"), Saver(tmp_path, CheckpointConfig(), lines.append, 2) as saver:
        if lockable:
            saver._copy = Device(memory=lockable).copy()
        for step in (1, 2):
            saver.save(step, tensors, {"step": step})
            assert (saver._running is not None) == (mode == "async")
            saver.settle(last=True)
            assert saver.saved == step
    # Said once.
    assert re.search(said, lines[-3]) and all("checkpoint.mode" not in line for line in lines[-2:])


def test_the_saving_thread_works_on_the_device_of_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: seen.append((device, threading.current_thread()))
    )
    with process_group(device="cpu"):
        saver = Saver(tmp_path, CheckpointConfig(mode="async"), print)
        saver.save(1, {"a": torch.randn(3)}, {})
        saver.settle()
        assert seen == [] and saver.saved == 1
        monkeypatch.setattr(saving, "device_of", lambda tensors: torch.device("cuda", 3))
        saver.save(2, {"a": torch.randn(3)}, {})
        thread = saver._running
        saver.settle()
        assert seen == [(torch.device("cuda", 3), thread)] and saver.saved == 2


def test_writing_asks_for_no_stream_even_where_cuda_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's saving thread would open a context on GPU 0 for it, and a run on the CPU one at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def fail(*_: Any) -> None:
        raise AssertionError("asked for a stream")

    monkeypatch.setattr(torch.cuda, "current_stream", fail)
    with process_group(device="cpu"):
        dcp.save(
            {"a": torch.randn(5)}, storage_writer=HashedWriter(tmp_path / "x"), process_group=dist.group.WORLD
        )
    assert list((tmp_path / "x").glob("*.distcp"))


@pytest.mark.gpu
def test_on_a_gpu_shards_are_copied_into_locked_memory_of_their_size() -> None:
    tree = {"a": torch.randn(3, 300_001, device="cuda")[1], "b": torch.arange(9, device="cuda"), "step": 3}
    copy = StagedCopy()
    assert device_of(tree) == torch.device("cuda", 0)
    copy.make_room(tree)
    for _ in range(2):
        tree["a"].normal_()
        taken = copy.take(tree)
        assert torch.equal(taken["a"], tree["a"].cpu()) and taken["step"] == 3
        assert taken["a"].is_pinned() and not taken["b"].is_pinned()
        assert taken["a"].untyped_storage().size() == taken["a"].nbytes
    copy.close()
    assert not taken["a"].is_pinned()


@pytest.mark.parametrize("error", [dcp.api.CheckpointException("together", {}), SystemExit()])
def test_a_save_that_ends_by_no_exception_has_failed(tmp_path: Path, error: BaseException) -> None:
    def write() -> Path:
        raise error

    save = saving._Save(tmp_path, 1, write, None, 0)
    save.start()
    save.join()
    assert save.problem is not None and "the save broke off: " in str(save.problem)
