"""Vectors of items from the words of their texts, for `configs/muse.toml` and [data.vectors].

    python examples/content_vectors.py --events runs/data/complete_journey/events.parquet \
        --text department,category,type --out runs/demo/content.parquet

Words and pairs of words are hashed, weighed by how rare they are, and reduced to `--dim` numbers by a
truncated singular value decomposition. It stands in for an encoder of texts and images, which is what MUSE
is made for: items with the same texts have the same vector.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline

HASHES = 1 << 14


def content_vectors(texts: list[str], dim: int, seed: int) -> np.ndarray:
    """float32 [texts, dim] of length 1, zeros for a text without words."""
    words = HashingVectorizer(n_features=HASHES, ngram_range=(1, 2), alternate_sign=False, norm=None)
    reduced = TruncatedSVD(dim, random_state=seed)
    found = make_pipeline(words, TfidfTransformer(), reduced).fit_transform(texts)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.where(length > 0, length, 1)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--events", type=Path, required=True, help="a table of events or of items, in Parquet"
    )
    parser.add_argument("--item", default="item_id", help="the column of the items")
    parser.add_argument("--text", default="department,category,type", help="columns of text, comma between")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    columns = given.text.split(",")
    # One row an item, whichever event says it first.
    table = pq.read_table(given.events, columns=[given.item, *columns])
    ids, first = np.unique(table[given.item].to_numpy(), return_index=True)
    rows = table.select(columns).take(first).to_pylist()
    texts = [" ".join(str(row[name] or "") for name in columns) for row in rows]
    vectors = content_vectors(texts, given.dim, given.seed)
    listed = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), given.dim)
    pq.write_table(pa.table({given.item: ids, "vector": listed}), given.out)
    print(f"{given.out}: {len(ids):,} items, {len(set(texts)):,} different texts, {given.dim} numbers each")


if __name__ == "__main__":
    main()
