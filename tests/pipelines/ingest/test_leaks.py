"""No request sees the future: noise in its place, in a log and in raw events, changes no batch of the past.

The tool that runs on real data (benchmarks/leaks/, figures in benchmarks/leaks.md) on small logs. Each test
has a control, where the noise begins with the newest behavior that a request does see.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.leaks.event_noise import Tail, compare_ingest
from benchmarks.leaks.log_noise import compare_log
from pipelines.ingest.config import IngestConfig
from tests.helpers import rawlogs
from tests.helpers.logs import Shape, enrich, random_rows, write_log
from trainer.config.sections import DataConfig, SearchConfig

SEARCH = SearchConfig(levels=("category_id", "item_id"), budget=6, half_life_days=0.0005)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Many behaviors in few seconds: most requests have some at their own time, and at it less the delay.
    rows = enrich(random_rows(21, Shape(users=60, behaviors=60)), seed=1)
    return write_log(tmp_path_factory.mktemp("leaks") / "log", {"train": rows}, rich=True)


@pytest.mark.parametrize("delay", [0, 15])
@pytest.mark.parametrize("search", [SearchConfig(), SEARCH], ids=["window", "search"])
def test_noise_at_or_after_a_request_never_reaches_it(
    log: Path, tmp_path: Path, delay: int, search: SearchConfig
) -> None:
    data = DataConfig(log=log, history_length=12, ingestion_delay=delay, search=search)
    found = compare_log(data, "train", 60, tmp_path / "noise")
    assert found.batches > 40 and found.requests > 2 * found.batches and found.replaced > 1000
    assert not found.batches_differ
    assert not found.differ, found.examples
    control = compare_log(data, "train", 60, tmp_path / "control", early=True)
    # A hard search keeps the newest behavior only where it matches a candidate.
    assert control.batches_differ >= (control.batches if not search.levels else control.batches // 2)
    assert control.differ >= (control.requests if not search.levels else control.requests // 2)


def raw(protocol: str, **changes: Any) -> IngestConfig:
    """All that a log may hold."""
    features: list[dict[str, Any]] = [{"name": "action", "side": "history"}, {"name": "tags", "multi": True}]
    context = [{"name": "city", "table": "events"}]
    if protocol == "impressions":
        features.append({"name": "slot", "side": "candidate"})
        context.append({"name": "page"})
    # Negatives that are no later item of the user either would know his future; that is another choice.
    changes = {"requests": {"exclude": "request", "min_history": 1, "negatives": 2}, **changes}
    return rawlogs.config(protocol, features=features, context=context, **changes)


@pytest.mark.parametrize(("protocol", "day"), [("next-basket", 3), ("time-split", 6), ("impressions", 4)])
def test_noise_in_raw_events_changes_no_earlier_request(tmp_path: Path, protocol: str, day: int) -> None:
    """From a day within training (3, 4) or validation (6) on; the noise changes what items are, too.

    A new item that never changes has its features before its first event, as a catalogue would have them: so
    all items have an event first, or none is asked before it has one.
    """
    raws = rawlogs.events(seed=3, users=30, per_user=40)
    config, data = raw(protocol), DataConfig(history_length=50)
    cut, shown = rawlogs.START + day * rawlogs.DAY, None
    if protocol == "impressions":
        rows = rawlogs.impressions(users=30, requests=12)
        shown = rawlogs.write(tmp_path / "impressions.parquet", rows, rawlogs.SHOWN)
        first = {**raws[0], "user_id": 99, "timestamp": rawlogs.START - rawlogs.DAY, "tags": ["x"]}
        raws += [{**first, "item_id": row["item_id"], "category": "c0"} for row in rows]
    else:
        config = config.model_copy(
            update={"requests": config.requests.model_copy(update={"new_items": "drop"})}
        )
    path = rawlogs.write(tmp_path / "events.parquet", raws)
    found = compare_ingest(path, config, Tail(cut), data, tmp_path / "noise", shown=shown)
    assert found.replaced > 100 and found.requests > 100
    assert (found.missing, found.extra, found.history, found.positives, found.candidates) == (0,) * 5
    # The control: noise that begins a day before what is compared does differ.
    sooner, plain = Tail(cut - rawlogs.DAY, before=cut), tmp_path / "noise" / "plain"
    control = compare_ingest(path, config, sooner, data, tmp_path / "control", plain, shown=shown)
    assert control.missing + control.extra + control.history > control.requests / 20
    # A basket is called by its second here, so that noise leaves none of that day to compare.
    assert protocol == "next-basket" or control.candidates > control.requests / 20
