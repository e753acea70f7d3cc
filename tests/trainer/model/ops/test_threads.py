"""Work in threads of Python, while torch is kept to one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from trainer.model.ops.threads import in_threads, torch_alone


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_parts_meet_in_threads_of_which_torch_has_one_each() -> None:
    """The first three parts wait for each other, so that each has a thread of its own."""
    meeting = threading.Barrier(3, timeout=30)
    weight = torch.ones(4, 4, requires_grad=True)

    def work(part: int, thread: int) -> tuple[int, int, int]:
        if part < 30:
            meeting.wait()
        # No gradient is asked for, as in the caller.
        torch.mm(weight, weight, out=torch.empty(4, 4))
        return part * part, thread, torch.get_num_threads()

    with torch.no_grad(), torch_alone():
        assert torch.get_num_threads() == 1
        found = in_threads(work, range(0, 70, 10))
    assert [square for square, _, _ in found] == [part * part for part in range(0, 70, 10)]
    assert {thread for _, thread, _ in found[:3]} == {0, 1, 2}
    assert {threads for _, _, threads in found} == {1}
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_a_part_that_fails_fails_them_all() -> None:
    def work(part: int, thread: int) -> int:
        if part == 1:
            raise ValueError("this one")
        return part

    with pytest.raises(ValueError, match="this one"):
        in_threads(work, range(3))
    assert torch.get_num_threads() == 3
    assert in_threads(work, [5, 6]) == [5, 6]
    assert in_threads(work, []) == []
