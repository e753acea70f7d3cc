"""Names of users and requests beside the numbers that a log has for them, for files of scores."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from embeddings.errors import DataError
from trainer.log.schema import VOCABULARIES, LogManifest
from trainer.quality.scored import Scored, write_scores
from trainer.serving.vocabulary import checked_values

_COLUMNS = {"user": "user_id", "request": "request_id"}


def write_named_scores(scored: Scored, path: Path, log: Path, manifest: LogManifest) -> list[str]:
    """Write the scores, with the names `user` and `request` where the log has names; returns remarks.

    Names that cannot be read are left out and remarked on: they must not cost the scores.
    """
    names, remarks = {}, []
    for column, key in _COLUMNS.items():
        if key not in manifest.named:
            continue
        try:
            file = log / VOCABULARIES / f"{key}.parquet"
            values = checked_values(file, manifest.named[key].vocabulary, of_log=True)
        except DataError as error:
            remarks.append(f"the scores have no column {column}: {error}")
            continue
        ids = getattr(scored, key)
        names[column] = values.take(pa.array(ids - 1, mask=(ids < 1) | (ids > len(values))))
    write_scores(scored, path, names)
    return remarks
