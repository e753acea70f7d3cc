"""Size, time and memory of a full export and of deltas, for one synthetic table

    tandemrec bench export --rows 2000000 --dim 32 --shards 16 --dir DIR

Writes two checkpoints of the table that differ in a share of the rows, in row-wise shards, then exports each
change whole and as a delta, in turns, and loads both.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, own_peak_bytes, seconds_of
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


def _write(source: Source, out: Path, dtype: Dtype, base: Tensor | None) -> StoredRows:
    shutil.rmtree(out, ignore_errors=True)
    (out / "tables").mkdir(parents=True)
    if base is None:
        (out / "tables").rmdir()
        stored: StoredRows = Draft(out, source, {_GROUP: dtype}).write_tables()[_GROUP][0]
    else:
        shape = base.shape[0], source.groups[_GROUP].width
        stored = write_changes(out, _STEM, _NAME, shape, dtype, lambda: source.rows(_GROUP, _FEATURE), base)
    return StoredRows.model_validate(stored.model_dump(include=set(StoredRows.model_fields)))


def _measure(
    source: Source, out: Path, dtype: Dtype, base: Tensor | None = None
) -> tuple[Seconds, int, StoredRows]:
    """Seconds (digests included), bytes, and what was written."""
    written: list[Any] = []
    seconds = seconds_of(lambda: written.extend([_write(source, out, dtype, base), _size(out)]))
    return seconds, written[1], written[0]


COLUMNS = {
    "dtype": "{dtype}",
    "changed": "{changed:.0%}",
    "full: s": "{full_s:.2f}",
    "cpu s": "{full_cpu_s:.2f}",
    "MB": "{full_mb:.1f}",
    "delta: s": "{delta_s:.2f}",
    "its cpu s": "{delta_cpu_s:.2f}",
    "its MB": "{delta_mb:.1f}",
    "load full s": "{load_full_s:.3f}",
    "load delta s": "{load_delta_s:.3f}",
}


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("export", __doc__)
    options.add_argument("--rows", type=int, default=2_000_000)
    options.add_argument("--dim", type=int, default=32)
    options.add_argument("--shards", type=int, default=16)
    options.add_argument("--dir", type=Path, required=True)
    given = options.read(words)
    report = Report(given, "Export", seed=0, n=1)
    warnings.simplefilter("ignore")
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
    for dtype in ("fp32", "fp16", "int8"):
        base_folder = given.dir / f"base-{dtype}"
        _, _, base = _measure(_source(given.dir, 1, group), base_folder, dtype)
        before = [(base_folder, base)]
        for step, share in enumerate(shares, start=2):
            source = _source(given.dir, step, group)
            row: Row = {"dtype": dtype, "changed": share}
            tables, loaded = {}, {}
            for kind in ("full", "delta"):
                held = None if kind == "full" else read_rows(before, _STEM, _NAME)
                seconds, size, tables[kind] = _measure(source, given.dir / kind, dtype, held)
                row |= {f"{kind}_s": seconds.wall, f"{kind}_cpu_s": seconds.cpu, f"{kind}_mb": size / 1e6}
            for kind, chain in (("full", []), ("delta", before)):
                parts = [*chain, (given.dir / kind, tables[kind])]
                load = partial(read_rows, parts, _STEM, _NAME)
                row[f"load_{kind}_s"] = seconds_of(lambda: loaded.update({kind: load()})).wall  # noqa: B023
            assert torch.equal(loaded["delta"], loaded["full"])
            report.rows.append(row)
            report.ratios[f"delta_to_full_bytes_{dtype}_{share:.0%}"] = row["delta_mb"] / row["full_mb"]
    report.table(COLUMNS, report.rows)
    report.line(f"peak memory {own_peak_bytes() / 1e9:.2f} GB, made data included")
    report.close()


def _source(folder: Path, step: int, group: TableGroup) -> Source:
    return Source(Config(), {_GROUP: group}, TableReader(folder / "checkpoints" / f"step-{step:08d}"))
