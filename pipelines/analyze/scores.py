"""Scores of the candidates of a split: those that `evaluate` kept, else of a sample that is scored here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from pipelines.analyze.runs import AnalysedRun
from trainer.data.sample import Sample
from trainer.log.arrow import PARQUET_ERRORS
from trainer.quality.evaluate import score_in_order
from trainer.quality.metrics import group_keys
from trainer.quality.ranking import Ints
from trainer.quality.score_files import joined
from trainer.quality.scored import Scored, numbers_of, scored_of
from trainer.storage.ranges import parquet_source

# Of scores that are at hand more are taken than would be scored for a report.
FROM_FILE = 200_000


@dataclass(frozen=True)
class RunScores:
    """Scores of a run.

    Attributes:
        split: whose candidates they are. scored: by user, request and place in the request; source: where
            they come from, in words.
    """

    run: AnalysedRun
    split: str
    scored: Scored
    source: str


def scores_of(run: AnalysedRun, split: str, sample: int) -> RunScores:
    """The scores that `evaluate` kept of this checkpoint, or those of a sample, scored now.

    Args:
        sample: about so many candidates are scored, those of whole users; 0 = all. Of a file up to
            `FROM_FILE` are taken.

    Raises:
        DataError: the split or the file is damaged, or the sample holds no user.
    """
    if (file := _kept(run, split)) is not None:
        limit = max(sample, FROM_FILE) if sample else 0
        scored, of = read_sample(file, limit)
        part = "" if scored.size == of else f", those of a sample of its users out of {of:,}"
        return RunScores(run, split, scored, f"{scored.size:,} candidates of {file.name}{part}")
    reader = run.reader(split, sample)
    with closing(reader.steps()) as steps:
        model = run.model(step.batch for step in steps if step.counted)
    parts = [part for part in score_in_order(model.score, reader, 0) if part.size]
    if not parts:
        raise DataError(f"the sample of {split} holds no user; raise --sample", file=run.config.data.log)
    scored = joined(parts).in_order()
    part = "" if reader.sample is None else f" of {reader.candidates:,}, those of a sample of users"
    return RunScores(run, split, scored, f"{scored.size:,} candidates{part}, scored for this report")


def _kept(run: AnalysedRun, split: str) -> Path | None:
    """The file of scores that `evaluate` wrote of this checkpoint, None where there is none."""
    if run.summary.get(f"{split}_step") != run.step:
        return None
    entry = run.summary.get(split)
    sampled = isinstance(entry, dict) and "sampled" in entry
    file = run.folder.scores(split, sampled)
    return file if file.exists() else None


def read_sample(file: Path, limit: int) -> tuple[Scored, int]:
    """-> (scores of a file, of about `limit` candidates of whole users, 0 = all; how many the file has).

    Which users are taken depends on their ids and on how many candidates there are, so that files of the
    same split have the same ones.

    Raises:
        DataError: missing or no such file.
    """
    try:
        with pq.ParquetFile(parquet_source(file), page_checksum_verification=True) as parquet:
            rows, names = parquet.metadata.num_rows, numbers_of(parquet.schema_arrow.names)
            sample = Sample(0, min(1.0, limit / rows) if limit and rows else 1.0)
            tables = []
            for number in range(parquet.num_row_groups):
                table = parquet.read_row_group(number, columns=names)
                tables.append(table.filter(pa.array(sample.holds(table.column("user_id").to_numpy()))))
            table = pa.concat_tables([parquet.schema_arrow.empty_table().select(names), *tables])
            found = scored_of({name: table.column(name).to_numpy() for name in names})
    except (*PARQUET_ERRORS, KeyError) as error:
        raise DataError(f"holds no scores of `tandemrec evaluate`: {error}", file=file) from None
    return found.in_order(), rows


def common(scores: Sequence[RunScores]) -> tuple[list[RunScores], int]:
    """-> (the scores of the candidates that all of them have; how many candidates any of them has).

    All are in the same order then.
    """
    names = ("user_id", "request_id", "candidate")
    keys = group_keys(*(np.concatenate([getattr(each.scored, name) for each in scores]) for name in names))
    ends = np.cumsum([each.scored.size for each in scores])
    own = np.split(keys, ends[:-1])
    shared: Ints = own[0]
    for part in own[1:]:
        shared = np.intersect1d(shared, part, assume_unique=True)
    kept = [
        replace(each, scored=each.scored.part(np.isin(part, shared)))
        for each, part in zip(scores, own, strict=True)
    ]
    return kept, int(np.unique(keys).size)
