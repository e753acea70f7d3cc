"""Script: by how many kilobytes this process grows while it writes a checkpoint's table into a snapshot.

python -m tests.programs.stream_tables CHECKPOINT OUT DTYPE ROWS DIM

Pages of files are left out: how many of them the kernel counts depends on how the files lie in its cache.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path

import torch

from embeddings.groups import TableGroup, TableSpec
from trainer.checkpoint.tensors import TableReader
from trainer.run_config import Config
from trainer.snapshot.writing import Draft, Source


def own_kilobytes() -> int:
    """Resident memory of this process alone, without pages of files (proc(5), statm)."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * resource.getpagesize() // 1024


class Growth(threading.Thread):
    """Looks every millisecond how much has come on top of what was there; a copy of a table takes longer."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over, self._before, self.most = threading.Event(), own_kilobytes(), 0

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.most = max(self.most, own_kilobytes() - self._before)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def main(path: Path, out: Path, dtype: str, rows: int, dim: int) -> None:
    torch.set_num_threads(1)
    group = TableGroup("attention", (TableSpec("item_id", rows, dim),))
    source = Source(Config(), {"attention": group}, TableReader(path))
    next(source.rows("attention", "attention__item_id"))
    growth = Growth()
    growth.start()
    Draft(out, source, {"attention": dtype}).write_tables()  # type: ignore[dict-item]
    print(growth.stop())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
