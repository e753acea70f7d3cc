"""Two servers share states: what one made, the other finds, and scores with to the same bits."""

from __future__ import annotations

from dataclasses import replace
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
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.user_state.shared_memory import SharedMemorySettings


def scorer_of(config: Config, level: SecondLevel | None) -> Scorer:
    # What was never exported has no digest; its path stands for it.
    snapshot = replace(snapshot_of(config), path=Path(f"weights of seed {config.train.seed}"))
    return Scorer(snapshot, user_states=UserStateSettings(least=1), store=level)


def scores(scorer: Scorer, requests: list[Request]) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [scorer.score([request])[0][0].probabilities for request in requests]


@pytest.mark.parametrize("name", ["twin", "dare"])
def test_a_state_of_another_server_scores_as_ones_own(tmp_path: Path, name: str) -> None:
    """A miss, a hit of another server's state, an extended one and one of another snapshot."""
    rows = random_rows(3, Shape(users=8, behaviors=60))
    log = write_log(tmp_path / "log", {"train": rows})
    # Windows that hold whole histories: else an older request asks for behaviors that no state has any more.
    config = preset(name, log, "data.history_length=100")
    kind = SharedMemorySettings(kind="shared_memory", folder=tmp_path)
    # One of each process, and one of a process that starts later.
    levels = [SecondLevel(kind.open()) for _ in range(3)]
    one, other, alone = (scorer_of(config, level) for level in (*levels[:2], None))
    requests = [
        JsonForm(model_body(body), one.needs, None, "requests[0]").request({}, Limits())
        for _, body in bodies(read_manifest(log), rows)
    ]
    expected = scores(alone, requests)
    assert all(map(np.array_equal, scores(one, requests), expected))
    assert one.states is not None and other.states is not None
    assert levels[0].flush(20)
    # Backwards: the state of a user's last request has what the former ones ask for.
    found = scores(other, requests[::-1])[::-1]
    assert all(map(np.array_equal, found, expected))
    mine, theirs = one.states.cache.statistics(), other.states.cache.statistics()
    my_store, their_store = levels[0].statistics(), levels[1].statistics()
    assert mine.outcomes["miss"] == my_store.look_ups["absent"] > 0
    assert their_store.look_ups["found"] == mine.outcomes["miss"] and theirs.outcomes["miss"] == 0
    assert theirs.outcomes["hit"] > 0 and their_store.writes["written"] == 0
    # Other weights are another snapshot: nothing of the old one is found.
    seeded = config.train.model_copy(update={"seed": 5})
    scores(scorer_of(config.model_copy(update={"train": seeded}), levels[2]), requests[:3])
    assert levels[2].statistics().look_ups["found"] == 0
    for level in levels:
        level.close()
