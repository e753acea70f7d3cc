"""Script: by how many kilobytes this process grows while it writes a checkpoint's table into a snapshot.

python -m tests.programs.stream_tables CHECKPOINT OUT DTYPE ROWS DIM [BASE]

With BASE, a folder that it wrote before, the table is a delta. Vectors of width 2 x DIM are written besides.

Pages of files are left out: how many of them the kernel counts depends on how the files lie in its cache.
"""

from __future__ import annotations

import resource
import sys
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.stored import Dtype
from trainer.checkpoint.tensors import TensorReader
from trainer.run_config import Config
from trainer.sealed_folder import entry_of
from trainer.snapshot.manifest import SnapshotFile, StoredRows
from trainer.snapshot.matrix_file import LayeredReader
from trainer.snapshot.rows import write_changes
from trainer.snapshot.search import Part
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


def main(path: Path, out: Path, dtype: Dtype, rows: int, dim: int, base: Path | None = None) -> None:
    torch.set_num_threads(1)
    name, stem = "attention__item_id", "tables/attention.0"
    group = TableGroup("attention", (TableSpec("item_id", rows, dim),))
    source = Source(Config(), {"attention": group}, TensorReader(path))
    next(source.rows("attention", name))
    part = Part("key", "attention", name, "item_id", rows, 2 * dim, torch.ones(dim, 2 * dim))
    draft = Draft(out, source, {"attention": dtype})
    growth = Growth()
    growth.start()
    if base is None:
        draft.write_tables()
        (out / "search").mkdir()
        vectors = partial(draft._part_rows, part)
        draft._write("search/main.0", "key__item_id", (rows, 2 * dim), dtype, vectors)
    else:
        (out / "tables").mkdir()
        file = SnapshotFile(path=f"{stem}.safetensors", **entry_of(base / f"{stem}.safetensors"))
        whole = StoredRows(rows=rows, dim=dim, dtype=dtype)
        with closing(LayeredReader([(base, {file.path: file}, whole)], stem, name)) as reader:
            again = partial(source.rows, "attention", name)
            written = write_changes(out, stem, name, (rows, dim), dtype, again, reader)
        assert written.stored.changed
    print(growth.stop())


if __name__ == "__main__":
    words = sys.argv
    main(Path(words[1]), Path(words[2]), words[3], int(words[4]), int(words[5]), *map(Path, words[6:]))  # type: ignore[arg-type]
