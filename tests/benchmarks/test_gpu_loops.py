"""Loops that are timed: their steps lie where the reader would have put them, and devices are waited for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import loops
from benchmarks.gpu.caches import TINY
from benchmarks.harness.timing import seconds_of
from trainer.data.batch import RequestBatch


def test_steps_are_prepared_as_the_reader_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On CUDA in pinned memory: each step would else wait for its copy, as none of training does."""
    prepared: list[RequestBatch] = []

    def prepare(batch: RequestBatch) -> RequestBatch:
        prepared.append(batch.to(torch.device("cpu")))
        return prepared[-1]

    monkeypatch.setattr(loops, "pinning", lambda device: prepare if device.type == "cuda" else None)
    made: Any = SimpleNamespace(model=None)
    monkeypatch.setattr(loops, "build_sharded", lambda *_, **__: made)
    for name in ("make_optimizer", "pipeline_of"):
        monkeypatch.setattr(loops, name, lambda *_: None)
    ranks: Any = SimpleNamespace(device=torch.device("cuda", 0))
    steps = loops.Loops(TINY, ranks, tmp_path, count=2).steps
    assert len(prepared) == 2
    assert all(step.batch is batch for step, batch in zip(steps, prepared, strict=True))


@pytest.mark.parametrize("started", [True, False])
def test_what_a_device_has_still_to_do_is_timed(started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that nobody uses is left alone: a question would open a context on it."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    seconds_of(lambda: told.append("work"))
    assert told == (["wait", "work", "wait"] if started else ["work"])
