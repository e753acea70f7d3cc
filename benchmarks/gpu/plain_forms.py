"""The plain torch forms of operators for which the trainer has kernels of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from trainer.model.ops import kept_rows
from trainer.model.retrieve import window_search

_WITH_KERNELS = (kept_rows, window_search)


@contextmanager
def without_kernels() -> Iterator[list[str]]:
    """Within it no operator takes a kernel of Triton's; -> the modules that would have been asked for one."""
    with ExitStack() as patches:
        for module in _WITH_KERNELS:
            patches.enter_context(mock.patch.object(module, "has_kernel", lambda device: False))
        yield [module.__name__ for module in _WITH_KERNELS]
