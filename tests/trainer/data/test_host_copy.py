"""What leaves the device, and what goes there: in order, bounded, and by the thread that has the time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embeddings.errors import DataError
from tests.helpers.logs import small_log
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch, pinning
from trainer.data.reader import SequenceLogReader
from trainer.ranks.host_copy import HostCopy, Unloading


def test_a_copy_is_what_the_tensor_was_when_it_was_made() -> None:
    tensor = torch.arange(3.0)
    copy = HostCopy(tensor)
    tensor.zero_()
    assert copy.wait().tolist() == copy.wait().tolist() == [0.0, 1.0, 2.0]


def test_unloading_keeps_the_order_and_waits_for_the_oldest_alone() -> None:
    """On a device that is not the CPU, here one without memory; the copies are numbered."""
    sent, waited = [], []

    class Sent(HostCopy):
        def __init__(self, tensor: torch.Tensor) -> None:
            self.number = len(sent)
            sent.append(tensor)

        def wait(self) -> torch.Tensor:
            waited.append(self.number)
            return torch.full((1,), float(self.number))

    unloading, under_way = Unloading(3, Sent), []
    for _ in range(10):
        unloading.add(torch.zeros(1, device="meta"))
        under_way.append(len(sent) - len(waited))
    assert max(under_way) == 3 and waited == list(range(7))
    assert torch.cat(unloading.all()).tolist() == list(range(10)) and waited == list(range(10))


def test_tensors_of_the_cpu_are_kept_as_they_are() -> None:
    unloading, tensors = Unloading(1), [torch.zeros(2), torch.ones(1)]
    for tensor in tensors:
        unloading.add(tensor)
    assert all(a is b for a, b in zip(unloading.all(), tensors, strict=True))


def reader(log: Path, prefetch: int, prepare: Callable[[RequestBatch], RequestBatch]) -> SequenceLogReader:
    config = DataConfig(log=log, history_length=8, batch_candidates=24, prefetch=prefetch)
    return SequenceLogReader(config, "train", None, prepare=prepare)


@pytest.mark.parametrize(("prefetch", "thread"), [(2, "prefetch"), (0, threading.main_thread().name)])
def test_batches_are_prepared_where_they_are_read(tmp_path: Path, prefetch: int, thread: str) -> None:
    threads, made = [], []

    def prepare(batch: RequestBatch) -> RequestBatch:
        threads.append(threading.current_thread().name)
        made.append(batch.to(torch.device("cpu")))
        return made[-1]

    given = [step.batch for step in reader(small_log(tmp_path / "log"), prefetch, prepare).steps()]
    assert len(given) > 2 and all(a is b for a, b in zip(given, made, strict=True))
    assert set(threads) == {thread}


def test_what_preparing_raises_reaches_the_consumer(tmp_path: Path) -> None:
    def prepare(batch: RequestBatch) -> RequestBatch:
        raise DataError("no pinned memory is left")

    steps = reader(small_log(tmp_path / "log"), 2, prepare).steps()
    with pytest.raises(DataError, match="no pinned memory"):
        next(steps)
    steps.close()


def test_batches_are_pinned_for_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rank's own device set in the thread that pins."""
    set_to: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    assert pinning(torch.device("cpu")) is None
    pin = pinning(torch.device("cuda", 3))
    assert pin is not None
    batch: Any = SimpleNamespace(pin_memory=lambda: "pinned")
    assert pin(batch) == "pinned" and set_to == [torch.device("cuda", 3)]
