"""Script: by how many kilobytes this process grows while it writes a checkpoint's table into a snapshot.

python -m tests.stream_tables CHECKPOINT OUT DTYPE ROWS DIM
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from embeddings.groups import TableGroup, TableSpec
from trainer.config import Config
from trainer.snapshot.writing import Draft, Source
from trainer.table_reader import TableReader


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(path: Path, out: Path, dtype: str, rows: int, dim: int) -> None:
    torch.set_num_threads(1)
    group = TableGroup("attention", (TableSpec("item_id", rows, dim),))
    source = Source(Config(), {"attention": group}, TableReader(path))
    next(source.rows("attention", "item_id"))
    before = peak()
    Draft(out, source, {"attention": dtype}).write_tables()  # type: ignore[dict-item]
    print(peak() - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
