"""The planted log `similar`: its vectors lie beside it, and they say what its clicks follow."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipelines.synth import similar
from pipelines.synth.synth import TRUTH, VECTORS, synth
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader


def test_vectors_lie_beside_the_log_and_say_what_the_items_do_not(tmp_path: Path) -> None:
    log = tmp_path / "log"
    synth(log, "similar", 3, 150)
    table = pq.read_table(log / VECTORS)
    assert table["item_id"].to_pylist() == list(range(1, similar.ITEMS + 1))
    given = np.stack(table["vector"].to_numpy())
    assert np.abs(np.linalg.norm(given, axis=1) - 1).max() < 1e-5
    rows = [row for row in pq.read_table(log / TRUTH).to_pylist() if row["split"] == "train"]
    keys = ("user_id", "request_id", "candidate")
    truth = {tuple(row[key] for key in keys): row["probability"] for row in rows}
    data = DataConfig.model_validate(
        {
            "log": str(log),
            "prefetch": 0,
            "vectors": {"content": {"file": str(log / VECTORS)}},
            "similarity": {"near": {"of": "content", "to": "content", "encoder": "buckets"}},
        }
    )
    nearest, probability = [], []
    for step in SequenceLogReader(data, "train", None).steps():
        batch = step.batch
        nearest += batch.features["near"].values().tolist()
        places = chain.from_iterable(map(range, batch.host_sizes.candidates))
        of_request = batch.candidate_request.tolist()
        names = [(int(batch.user_id[r]), int(batch.request_id[r])) for r in of_request]
        probability += [truth[(*name, place)] for name, place in zip(names, places, strict=True)]
    # By what is nearest alone; the second nearest behavior counts, too.
    assert np.corrcoef(nearest, probability)[0, 1] > 0.8
    assert 0.1 < np.mean(np.array(probability) > 0.5) < 0.9
