"""The plain torch forms of operators for which the trainer has kernels of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

_ASKED = "has_kernel"


@contextmanager
def without_kernels() -> Iterator[list[str]]:
    """Within it no operator takes a kernel of Triton's; -> the modules that would have been asked for one."""
    modules = {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith("trainer.model.") and hasattr(module, _ASKED)
    }
    with ExitStack() as patches:
        for module in modules.values():
            patches.enter_context(mock.patch.object(module, _ASKED, lambda device: False))
        yield sorted(modules)
