"""Tables of similarities say what their rows stand for, so that they start no others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embeddings.errors import CheckpointError
from tests.helpers.logs import manifest_of
from trainer.checkpoint.warm_start import _row_map, vocabularies
from trainer.config.sections import DataConfig
from trainer.data.similarity.encoding import similarity_features


def known(file: str = "items.parquet", **changes: Any) -> Any:
    """What the rows of a part stand for."""
    similarity = {"of": "items", "to": "items", **changes}
    data = {"vectors": {"items": {"file": file}}, "similarity": {"near": similarity}}
    more = similarity_features(DataConfig.model_validate(data))
    return vocabularies(manifest_of(), Path("log/vocab"), more)["near_base_2"]


def test_rows_follow_the_settings_of_a_similarity() -> None:
    digest = known().digest
    assert digest.startswith('encoded: similarity of item_id to item_id: {"of":"items","to":"items"')
    described = SimpleNamespace(vocabularies={"near_base_2": digest}, rows={"near_base_2": 17})
    source: Any = SimpleNamespace(name="plain", manifest=described)
    # The same rows, wherever the vectors lie.
    assert _row_map("near_base_2", known(), source, set()) is None
    assert _row_map("near_base_2", known(file="elsewhere.parquet"), source, set()) is None
    for changes in ({"statistic": "mean"}, {"step": 0.02}, {"bases": [2, 5]}):
        with pytest.raises(CheckpointError, match="near_base_2 was encoded otherwise"):
            _row_map("near_base_2", known(**changes), source, set())
