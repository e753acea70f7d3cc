"""Builds an index over items, measures what it finds, and chooses its setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from embeddings.errors import DataError
from pipelines.console import table_lines
from pipelines.vectors.items import ItemColumns
from pipelines.vectors.job import Job
from pipelines.vectors.queries import candidate_queries, user_queries
from pipelines.vectors.users import UserSource
from trainer.ranks.machine import cores
from trainer.snapshot.retrieval.indexes.kind import IndexKind, Setting
from trainer.snapshot.retrieval.indexes.table import INDEXES
from trainer.snapshot.retrieval.recall import KS, Queries, Timed, best_products, build_index, measured
from trainer.snapshot.retrieval.vector_files import GROUPS, VECTORS, IndexInfo, MeasuredRecall


def write_index(job: Job, part: Path, wanted: ItemColumns) -> IndexInfo:
    """index.<head>.faiss of every head, with the cheapest setting that finds enough -> what was measured."""
    import faiss

    file, heads, options = part / VECTORS, job.space.heads, job.options
    with pq.ParquetFile(file) as parquet:
        rows, width = parquet.metadata.num_rows, parquet.schema_arrow.field("vector").type.list_size
    queries = _queries(job, part, wanted, rows)
    if not len(queries.vector):
        raise DataError(f"split {options.split!r} has no request that could ask the index", file=job.log)
    kind = INDEXES[options.index](rows, width // heads, job.seed)
    faiss.omp_set_num_threads(cores())
    of_heads: list[list[list[Timed]]] = []
    ks = [k for k in KS if k <= rows] or [rows]
    files = [f"index.{head}.faiss" for head in range(heads)]
    for head, name in enumerate(files):
        asked = queries.of_head(head, heads)
        best, _ = best_products(file, asked, ks[-1], head, heads)
        index = build_index(file, kind, head, heads)
        of_heads.append([measured(index, kind, setting, asked, best, ks) for setting in kind.settings])
        # A file for each head, written before the next one is built: one is in memory at a time.
        _save(index, part / name)
        del index
    means = [_mean(timed) for timed in zip(*of_heads, strict=True)]
    chosen = _chosen(kind, [[each.recall for each in of_ks] for of_ks in means], options.recall)
    for name in files:
        index = faiss.read_index(str(part / name))
        kind.apply(index, chosen)
        _save(index, part / name)
    job.remarks += _lines(means, chosen, options.recall)
    flat = [each.recall for of_ks in means for each in of_ks]
    return IndexInfo(kind=kind.name, parameters=kind.parameters, setting=chosen, files=files, recall=flat)


def _save(index: Any, file: Path) -> None:
    import faiss

    faiss.write_index(index, str(file))


def _queries(job: Job, part: Path, wanted: ItemColumns, rows: int) -> Queries:
    """Users where they have vectors, else candidates of requests."""
    options = job.options
    if job.space.user_obstacle:
        return candidate_queries(
            wanted, job.space, job.log, job.manifest, options.split, rows, options.queries, job.seed
        )
    stretches: dict[int, slice] = {}
    if wanted.group:
        for row in pq.read_table(part / GROUPS).to_pylist():
            stretches[row["group"]] = slice(row["first"], row["first"] + row["rows"])
    source = UserSource.of(job.snapshot, job.space, job.log, options.split)
    return user_queries(source, stretches, rows, options.queries, job.seed)


def _mean(of_heads: tuple[list[Timed], ...]) -> list[Timed]:
    """What one setting finds on average over the heads, for each K; times are of all heads together."""
    found = []
    for of_k in zip(*of_heads, strict=True):
        recall = sum(each.recall.recall for each in of_k) / len(of_k)
        first = of_k[0].recall
        mean = MeasuredRecall(setting=first.setting, k=first.k, queries=first.queries, recall=recall)
        found.append(Timed(mean, sum(each.milliseconds for each in of_k)))
    return found


def _chosen(kind: IndexKind, recalls: list[list[MeasuredRecall]], least: float) -> Setting:
    """The first setting that finds enough of the most rows that were asked for; else the last one."""
    for setting, of_ks in zip(kind.settings, recalls, strict=True):
        if of_ks[-1].recall >= least:
            return setting
    return kind.settings[-1]


def _lines(means: list[list[Timed]], chosen: Setting, least: float) -> list[str]:
    """A table of settings, and a warning where none finds enough."""
    ks = [each.recall.k for each in means[0]]
    rows = []
    for of_ks in means:
        setting = of_ks[0].recall.setting
        name = ", ".join(f"{key} {value}" for key, value in setting.items()) or "all rows"
        mark = " *" if setting == chosen else ""
        rows.append(
            [name + mark, *(f"{each.recall.recall:.4f}" for each in of_ks), f"{of_ks[0].milliseconds:.3f}"]
        )
    lines = table_lines(["setting", *(f"recall@{k}" for k in ks), "ms/query"], rows)
    if means[-1][-1].recall.recall < least and all(of_ks[-1].recall.recall < least for of_ks in means):
        lines.append(f"warning: no setting finds {least:.0%} of the {ks[-1]} best rows; take --index flat")
    return lines
