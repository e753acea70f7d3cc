"""MovieLens 100K as a table of impressions: 100,000 ratings of 1,682 films by 943 users, 1997 and 1998.

F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015. The data
may be used for research; GroupLens forbids commercial use and redistribution without permission, so they are
fetched and not kept here. RecBole (MIT) ships them in its wheel as an example.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.fetch.wheel import Wheel
from trainer.sealed_folder import scratch

RECBOLE = Wheel("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
RATINGS = "ratings.parquet"
_FILE = "recbole/dataset_example/ml-100k/ml-100k"
_LEAST, _MOST = 1.0, 5.0


def fetch_movielens(out: Path, offline_wheel: Path | None = None) -> Path:
    """Write `<out>/ratings.parquet`, unless it is there.

    A row is a rating: user_id, item_id and timestamp (unix seconds) as int64, rating (1 to 5), grade (the
    same from 0 to 1), and of the film category (the first of its genres, which are in no order of weight),
    genres (all of them, between spaces) and year.

    Raises:
        DataError: the download failed, or the wheel is another one.
    """
    file = out / RATINGS
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        with scratch(out, ".fetch", owns=True) as temporary:
            wheel = RECBOLE.download(temporary) if offline_wheel is None else offline_wheel
            contents = RECBOLE.read(wheel, [f"{_FILE}.inter", f"{_FILE}.item"])
            table = ratings(*(content.decode("utf-8") for content in contents.values()))
            pq.write_table(table, temporary / RATINGS, compression="zstd", write_page_checksum=True)
            (temporary / RATINGS).replace(file)
    return file


def ratings(rated: str, films: str) -> pa.Table:
    """The table, of the text of RecBole's files of interactions and of items, by user and time."""
    rows, film_of = _rows(rated), {row["item_id:token"]: row for row in _rows(films)}
    rating = np.array([float(row["rating:float"]) for row in rows])
    of_rows = [film_of[row["item_id:token"]] for row in rows]
    genres = [film["class:token_seq"] for film in of_rows]
    table = pa.table(
        {
            "user_id": pa.array([int(row["user_id:token"]) for row in rows], pa.int64()),
            "item_id": pa.array([int(row["item_id:token"]) for row in rows], pa.int64()),
            "timestamp": pa.array([int(float(row["timestamp:float"])) for row in rows], pa.int64()),
            "rating": rating,
            "grade": (rating - _LEAST) / (_MOST - _LEAST),
            "category": [every.split(" ")[0] or None for every in genres],
            "genres": genres,
            "year": [film["release_year:token"] or None for film in of_rows],
        }
    )
    return table.sort_by([(name, "ascending") for name in ("user_id", "timestamp", "item_id")])


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
