"""Size, time and memory of a full export and of deltas, for one synthetic table

    tandemrec bench export --rows 2000000 --dim 32 --shards 16 --dir DIR

Writes two checkpoints of the table that differ in a share of the rows, in row-wise shards, then exports each
change whole and as a delta, in turns, and looks 10,000 rows up in both.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from contextlib import closing
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
from embeddings.lookup.stored import Dtype, sum_bags
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.tensors import TensorReader
from trainer.ranks.process_group import process_group
from trainer.run_config import Config
from trainer.snapshot.manifest import ListedFile
from trainer.snapshot.matrix_file import LayeredReader
from trainer.snapshot.rows import Written, read_rows, write_changes, write_rows
from trainer.snapshot.writing import Source

_GROUP, _FEATURE = "attention", "item_id"
_STEM, _NAME = "tables/attention.0", "attention__item_id"
_LOOKED_UP = 10_000


def _checkpoint(folder: Path, step: int, whole: Tensor, shards: int) -> None:
    each = whole.shape[0] // shards
    parts = [Shard.from_tensor_and_offsets(p, [i * each, 0], 0) for i, p in enumerate(whole.split(each))]
    with process_group():
        table = init_from_local_shards(parts, *whole.shape)
        name = f"collections.{_GROUP}.embedding_bags.{_NAME}.weight"
        checkpoint.save(folder, step, {"model": {name: table}}, {"step": step}, 99)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _write(source: Source, out: Path, dtype: Dtype, base: tuple[Path, Written] | None) -> Written:
    shutil.rmtree(out, ignore_errors=True)
    (out / "tables").mkdir(parents=True)
    group = source.groups[_GROUP]
    shape, rows = (group.tables[0].rows, group.width), partial(source.rows, _GROUP, _NAME)
    if base is None:
        return write_rows(out, _STEM, _NAME, shape, dtype, rows)
    folder, written = base
    listed: dict[str, ListedFile] = {entry.path: entry for entry in written.files}
    with closing(LayeredReader([(folder, listed, written.stored)], _STEM, _NAME)) as reader:
        return write_changes(out, _STEM, _NAME, shape, dtype, rows, reader)


def _measure(
    source: Source, out: Path, dtype: Dtype, base: tuple[Path, Written] | None = None
) -> tuple[Seconds, int, Written]:
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
    "look up in full: ms": "{look_up_full_ms:.2f}",
    "in delta: ms": "{look_up_delta_ms:.2f}",
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
        for step, share in enumerate(shares, start=2):
            source = _source(given.dir, step, group)
            row: Row = {"dtype": dtype, "changed": share}
            tables, loaded = {}, {}
            for kind in ("full", "delta"):
                held = None if kind == "full" else (base_folder, base)
                seconds, size, written = _measure(source, given.dir / kind, dtype, held)
                tables[kind] = written.stored
                row |= {f"{kind}_s": seconds.wall, f"{kind}_cpu_s": seconds.cpu, f"{kind}_mb": size / 1e6}
            some = torch.randint(given.rows, (_LOOKED_UP,), generator=rng)
            for kind, chain in (("full", []), ("delta", [(base_folder, base.stored)])):
                stored = read_rows([*chain, (given.dir / kind, tables[kind])], _STEM, _NAME)
                look_up = partial(sum_bags, stored, some, torch.arange(_LOOKED_UP + 1))
                look_up()
                seconds = seconds_of(lambda: loaded.update({kind: look_up()}))  # noqa: B023
                row[f"look_up_{kind}_ms"] = 1e3 * seconds.wall
            assert torch.equal(loaded["delta"], loaded["full"])
            report.rows.append(row)
            report.ratios[f"delta_to_full_bytes_{dtype}_{share:.0%}"] = row["delta_mb"] / row["full_mb"]
    report.table(COLUMNS, report.rows)
    report.line(f"peak memory {own_peak_bytes() / 1e9:.2f} GB, made data included")
    report.close()


def _source(folder: Path, step: int, group: TableGroup) -> Source:
    return Source(Config(), {_GROUP: group}, TensorReader(folder / "checkpoints" / f"step-{step:08d}"))
