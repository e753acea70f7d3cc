"""What a pipeline still asks the device when training ends before its steps do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

import trainer.loop.pipeline
from embeddings.errors import RankError
from trainer.loop.pipeline import Pipeline
from trainer.ranks.process_group import process_group

LOST = RankError("rank 0, after step 2: waited in vain for rank 1")


class Inner:
    """Stands for TorchRec's pipeline; the third step fails where it is given an error."""

    def __init__(self, error: Exception | None) -> None:
        self._error, self._steps = error, 0

    def progress(self, batches: Iterator[Any]) -> Any:
        self._steps += 1
        if self._error is not None and self._steps == 3:
            raise self._error
        return next(batches)

    def detach(self) -> None:
        if self._error is not None:
            # As TorchRec does where the first exchange of ids has failed.
            raise AssertionError("Number of KJT dists (2) does not match number of kjt dist forwards (0)")

    def __getattr__(self, name: str) -> Any:
        return lambda: None


def asked(
    monkeypatch: pytest.MonkeyPatch, inside: Exception | None = None, outside: Exception | None = None
) -> list[str]:
    """What is asked where a step, or the loop around the steps, raises an error; else the loop stops."""
    told: list[str] = []
    monkeypatch.setattr(trainer.loop.pipeline, "forget_prefetched", lambda _: told.append("forget"))
    made = Pipeline.__new__(Pipeline)
    made.kind = "prefetch"
    made._model, made._inner = None, Inner(inside)  # type: ignore[assignment]
    made._step = SimpleNamespace(settle=lambda: told.append("settle"))  # type: ignore[assignment]
    steps: Any = [SimpleNamespace(batch=number) for number in range(6)]
    with (
        suppress(RankError, ValueError, dist.DistBackendError),
        closing(made.train(steps)) as ran,
    ):
        for done, _ in enumerate(ran):
            if done == 3:
                if outside is not None:
                    raise outside
                break
    return told


def test_the_last_step_is_looked_at_before_anything_is_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch) == ["settle", "forget"]
    assert asked(monkeypatch, outside=ValueError("of a metric")) == ["settle", "forget"]
    assert asked(monkeypatch, inside=ValueError("of a batch")) == ["forget"]


def test_what_went_wrong_is_said_and_not_what_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`asked` lets the errors through that it is given, and no other."""
    assert asked(monkeypatch, inside=ValueError("of the exchange")) == ["forget"]


def test_a_group_that_cannot_be_left_is_not_what_a_run_failed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = dist.destroy_process_group

    def broken() -> None:
        leave()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(dist, "destroy_process_group", broken)
    with pytest.raises(ValueError, match="the cause"), process_group(device="cpu"):
        raise ValueError("the cause")
    assert not dist.is_initialized()


def test_nobody_waits_for_a_device_that_waits_for_a_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NCCL it would wait without end, and the process with it would keep the run folder and the GPU."""
    gone = RankError("rank 0: the launcher (process 7) is gone; start again")
    for error in (LOST, gone, dist.DistBackendError("NCCL communicator was aborted on rank 0")):
        assert asked(monkeypatch, outside=error) == [] == asked(monkeypatch, inside=error)
