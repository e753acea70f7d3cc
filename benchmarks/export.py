"""Size, time and memory of a full export and of deltas, for one synthetic table.

    python -m benchmarks.export --rows 2000000 --dim 32 --shards 16 --dir DIR

Writes two checkpoints of the table that differ in a share of the rows, in row-wise shards, then exports each
change whole and as a delta, in turns, and loads both.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.stored import Dtype
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.tensors import TableReader
from trainer.ranks.process_group import process_group
from trainer.run_config import Config
from trainer.snapshot.manifest import StoredRows
from trainer.snapshot.rows import read_rows, write_changes
from trainer.snapshot.writing import Draft, Source

_GROUP, _FEATURE = "attention", "item_id"
_STEM, _NAME = "tables/attention.0", "attention__item_id"


def _checkpoint(folder: Path, step: int, whole: Tensor, shards: int) -> None:
    each = whole.shape[0] // shards
    parts = [Shard.from_tensor_and_offsets(p, [i * each, 0], 0) for i, p in enumerate(whole.split(each))]
    with process_group():
        table = init_from_local_shards(parts, *whole.shape)
        name = f"collections.{_GROUP}.embedding_bags.{_NAME}.weight"
        checkpoint.save(folder, step, {"model": {name: table}}, {"step": step}, 99)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _measure(
    source: Source, out: Path, dtype: Dtype, base: Tensor | None
) -> tuple[float, float, int, StoredRows]:
    """Wall and processor seconds (digests included), bytes, and what was written."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "tables").mkdir(parents=True)
    wall, cpu = time.perf_counter(), time.process_time()
    if base is None:
        (out / "tables").rmdir()
        stored: StoredRows = Draft(out, source, {_GROUP: dtype}).write_tables()[_GROUP][0]
    else:
        shape = base.shape[0], source.groups[_GROUP].width
        stored = write_changes(out, _STEM, _NAME, shape, dtype, lambda: source.rows(_GROUP, _FEATURE), base)
    size = _size(out)
    plain = StoredRows.model_validate(stored.model_dump(include=set(StoredRows.model_fields)))
    return time.perf_counter() - wall, time.process_time() - cpu, size, plain


def main() -> None:
    """Print one line a share and type."""
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=2_000_000)
    options.add_argument("--dim", type=int, default=32)
    options.add_argument("--shards", type=int, default=16)
    options.add_argument("--dir", type=Path, required=True)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    whole = torch.randn(given.rows, given.dim, generator=rng)
    shares = (0.01, 0.10, 0.30)
    _checkpoint(given.dir / "checkpoints", 1, whole, given.shards)
    for step, share in enumerate(shares, start=2):
        other = whole.clone()
        other[torch.randperm(given.rows, generator=rng)[: int(share * given.rows)]] += 0.1
        _checkpoint(given.dir / "checkpoints", step, other, given.shards)
        del other
    del whole
    group = TableGroup(_GROUP, (TableSpec(_FEATURE, given.rows, given.dim),))
    print("dtype  changed  full: s  cpu s   MB    delta: s  cpu s   MB    load full s  load delta s")
    for dtype in ("fp32", "fp16", "int8"):
        base_folder = given.dir / f"base-{dtype}"
        source = _source(given.dir, 1, group)
        _, _, _, base = _measure(source, base_folder, dtype, None)
        for step, share in enumerate(shares, start=2):
            source = _source(given.dir, step, group)
            full = _measure(source, given.dir / "full", dtype, None)
            delta = _measure(
                source, given.dir / "delta", dtype, read_rows([(base_folder, base)], _STEM, _NAME)
            )
            begin = time.perf_counter()
            wanted = read_rows([(given.dir / "full", full[3])], _STEM, _NAME)
            middle = time.perf_counter()
            found = read_rows([(base_folder, base), (given.dir / "delta", delta[3])], _STEM, _NAME)
            end = time.perf_counter()
            assert torch.equal(found, wanted)
            print(
                f"{dtype:6} {share:6.0%}  {full[0]:7.2f} {full[1]:6.2f} {full[2] / 1e6:6.1f}  "
                f"{delta[0]:7.2f} {delta[1]:6.2f} {delta[2] / 1e6:6.1f}  "
                f"{middle - begin:7.3f} {end - middle:9.3f}",
                flush=True,
            )
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB, made data included"
    )


def _source(folder: Path, step: int, group: TableGroup) -> Source:
    return Source(Config(), {_GROUP: group}, TableReader(folder / "checkpoints" / f"step-{step:08d}"))


if __name__ == "__main__":
    main()
