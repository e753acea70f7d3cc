"""Parts of a request's work side by side, in threads of Python.

Torch's own threads share each operator and wait for each other at its end. Where a core is busy with
something else they wait long, hundreds of times a request. Here each thread has parts of its own, takes the
next one when it is ready, and is waited for once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
# How many there may be where torch is kept to one.
_threads = ContextVar("threads", default=1)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Torch does its operators in the calling thread alone; the others are there for `in_threads`."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    before = _threads.set(threads)
    try:
        yield
    finally:
        _threads.reset(before)
        torch.set_num_threads(threads)


def in_threads(work: Callable[[int, int], T], parts: Sequence[int]) -> list[T]:
    """What `work` gives of each part and the number of the thread that does it, in the parts' order.

    There are as many threads as torch has, the caller among them. Torch does every part in one of them alone,
    so that what it gives does not depend on how many there are. Parts of a part are not shared out. No
    gradients.
    """
    with torch_alone():
        threads = min(_threads.get(), len(parts))
        if threads <= 1:
            return [work(part, 0) for part in parts]
        # The others have a context of their own, in which there is one.
        before = _threads.set(1)
        found: dict[int, T] = {}
        left, inference = iter(parts), torch.is_inference_mode_enabled()

        def some(thread: int) -> None:
            with torch.inference_mode(inference), torch.no_grad():
                for part in left:
                    found[part] = work(part, thread)

        others = [_helpers(threads - 1).submit(some, thread) for thread in range(1, threads)]
        try:
            some(0)
        finally:
            _threads.reset(before)
            problems = [other.exception() for other in others]
        for problem in filter(None, problems):
            raise problem
        return [found[part] for part in parts]


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "score beside", torch.set_num_threads, (1,))


# The threads of a process are not there in one that is forked off.
os.register_at_fork(after_in_child=_helpers.cache_clear)
