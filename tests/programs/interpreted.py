"""What holds of kernels in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.programs.interpreted`.

A program, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys

import torch

from tests.helpers import kept_rows, searched_windows
from trainer.model.ops import kept_rows as rows_kernel
from trainer.model.retrieve import window_search

if __name__ == "__main__":
    searched_windows.check_drawn()
    for stretch in (True, False):
        searched_windows.check_plain(searched_windows.drawn_long(stretch))
    kept_rows.check_drawn()
    # What a device is asked before it is given a kernel.
    assert window_search.same_as_plain(torch.device("cpu"))
    assert rows_kernel.same_as_plain(torch.device("cpu"))
    sys.stdout.write("all held\n")
