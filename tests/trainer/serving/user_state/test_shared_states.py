"""Two servers share states: what one made, the other finds, and scores with to the same bits."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import bodies, model_body, snapshot_of
from trainer.log.schema import read_manifest
from trainer.run_config import Config
from trainer.serving.json_body import JsonForm
from trainer.serving.request import Limits, Request
from trainer.serving.scorer import Scorer
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.user_state.shared_memory import SharedMemorySettings


def scorer_of(config: Config, folder: Path | None, version: str = "v00000001") -> Scorer:
    store = None if folder is None else SharedMemorySettings(kind="shared_memory", folder=folder)
    return Scorer(snapshot_of(config, Path(version)), user_states=UserStateSettings(least=1, store=store))


def scores(scorer: Scorer, requests: list[Request]) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [scorer.score([request])[0][0].probabilities for request in requests]


@pytest.mark.parametrize("name", ["twin", "dare"])
def test_a_state_of_another_server_scores_as_ones_own(tmp_path: Path, name: str) -> None:
    """A miss, a hit of another server's state, an extended one and one of another snapshot."""
    rows = random_rows(3, Shape(users=8, behaviors=60))
    log = write_log(tmp_path / "log", {"train": rows})
    # Windows that hold whole histories: else an older request asks for behaviors that no state has any more.
    config = preset(name, log, "data.history_length=100")
    one, other, alone = (scorer_of(config, folder) for folder in (tmp_path, tmp_path, None))
    requests = [
        JsonForm(model_body(body), one.needs, None, "requests[0]").request({}, Limits())
        for _, body in bodies(read_manifest(log), rows)
    ]
    expected = scores(alone, requests)
    assert all(map(np.array_equal, scores(one, requests), expected))
    assert one.states is not None and other.states is not None
    level = one.states.cache._second
    assert level is not None and level.flush(20)
    # Backwards: the state of a user's last request has what the former ones ask for.
    found = scores(other, requests[::-1])[::-1]
    assert all(map(np.array_equal, found, expected))
    mine, theirs = one.states.cache.statistics(), other.states.cache.statistics()
    assert mine.store is not None and theirs.store is not None
    assert mine.outcomes["miss"] == mine.store.look_ups["absent"] > 0
    assert theirs.store.look_ups["found"] == mine.outcomes["miss"] and theirs.outcomes["miss"] == 0
    assert theirs.outcomes["hit"] > 0 and theirs.store.writes["written"] == 0
    # Of another version nothing is found.
    changed = scorer_of(config, tmp_path, "v00000002")
    scores(changed, requests[:3])
    assert changed.states is not None
    store = changed.states.cache.statistics().store
    assert store is not None and store.look_ups["found"] == 0
    writer = level._writer
    del one, level
    gc.collect()
    writer.join(20)
    assert not writer.is_alive(), "a version that is let go leaves its store"
