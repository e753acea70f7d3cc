"""What must hold of the kernels, in Triton's interpreter: `TRITON_INTERPRET=1 python -m tests.interpreted`.

A program, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys

from tests import kept_rows, searched_windows

if __name__ == "__main__":
    searched_windows.check_drawn()
    for stretch in (True, False):
        searched_windows.check_plain(searched_windows.drawn_long(stretch))
    kept_rows.check_drawn()
    sys.stdout.write("all held\n")
