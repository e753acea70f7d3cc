"""Vectors of ids that are any integers, with a table of them whose ids come and go, or without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.living import RAW, raw_id, raw_rows, see, stage_of
from tests.helpers.logs import Row, Shape, write_log
from tests.helpers.models import preset
from tests.helpers.serving import bodies, model_body
from tests.helpers.similarity import drawn_vectors, shown, slow_similarities, write_parquet
from tests.helpers.snapshots import exported, save_run
from trainer.data.reader import SequenceLogReader
from trainer.data.similarity.encoding import similarity_features
from trainer.log.schema import read_manifest
from trainer.serving.json_body import JsonForm
from trainer.serving.request import Limits
from trainer.serving.scorer import Scorer
from trainer.snapshot import load_snapshot

ROWS: list[Row] = raw_rows(4, Shape(users=8))
VECTORS = {raw_id(item): vector for item, vector in drawn_vectors(1, range(1, 80)).items()}
IDS = ("ids.item_id.capacity=40", "ids.item_id.shared_rows=4")
NO_TABLE = (
    'groups.attention.features=["category_id"]',
    'groups.representation.features=["category_id", "near"]',
)


@pytest.mark.parametrize("living", [True, False], ids=["ids come and go", "no table"])
def test_raw_ids_are_compared_from_the_log_to_the_service(tmp_path: Path, living: bool) -> None:
    log = write_log(tmp_path / "log", {"train": ROWS}, more=RAW)
    more = [f"data.vectors.items.file={write_parquet(tmp_path / 'items.parquet', VECTORS)}"]
    more += ["data.similarity.near.of=items", "data.similarity.near.to=items", *(IDS if living else NO_TABLE)]
    config = preset("dare", log, *more)
    stage = stage_of(config)
    see(stage, range(10, 40), 1000)
    run = save_run(tmp_path / "run", log, "dare", *more, ids=stage if living else None)
    snapshot = load_snapshot(exported(run, tmp_path / "snapshot"))
    serving, manifest = Scorer(snapshot), read_manifest(log)
    assert "item_id" in serving.needs.living and serving.needs.candidates.known == ("item_id", "category_id")

    data, near = config.data, config.data.similarity["near"]
    features = similarity_features(data)
    expected = slow_similarities(ROWS, "near", near, data.history_length, VECTORS, VECTORS, "item_id")
    reader = SequenceLogReader(data, "train", snapshot.id_bounds(), vectors=snapshot.vectors)
    assert shown((step.batch for step in reader.steps()), features) == expected

    def ids_of(body: dict[str, object]) -> list[dict[str, list[int]]]:
        request = JsonForm(model_body(body), serving.needs, None, "requests[0]").request({}, Limits())
        batch = serving.batch([request])
        return list(shown([batch], features).values())

    named = bodies(manifest, ROWS)
    for (_, request), body in named[:12]:
        asked = [ids for (name, _), ids in expected.items() if name == request]
        assert ids_of(body) == asked
    # An item that came after the training has a vector, and so a similarity; another one has none.
    (_, body), *_ = [each for each in named if np.size(each[1]["history"]["timestamp"]) > 9]
    new, unknown = (
        {**body, "candidates": {"item_id": [item], "category_id": [1]}} for item in (raw_id(73), 5)
    )
    assert ids_of(new)[0]["near_base_10"] != [0] == ids_of(unknown)[0]["near_base_10"]
