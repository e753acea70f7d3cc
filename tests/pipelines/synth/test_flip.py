"""The planted stream whose best item changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.synth.flip import CANDIDATES, FLIP, flip, star_ids
from pipelines.synth.log import DAY, START
from pipelines.synth.synth import synth
from trainer.log.schema import VOCABULARIES

LOG = flip(3, 240)


def test_the_splits_follow_each_other_and_the_flip_is_in_the_last() -> None:
    times = [part.request_time.reshape(-1) for part in LOG.splits.values()]
    assert (np.diff(np.concatenate(times)) >= 0).all()
    assert [int((part - START).max() // DAY) for part in times] == [5, 6, 8]
    assert times[2].min() < FLIP - DAY // 2 and times[2].max() > FLIP + DAY // 2


def test_the_stars_change_places_at_the_flip() -> None:
    best_before, best_after = star_ids(3)
    for part in LOG.splits.values():
        items, p = part.candidates["item_id"][:, 0], part.probability[:, 0]
        late = part.request_time[:, 0] >= FLIP
        best = items[np.arange(len(p)), p.argmax(axis=1)]
        worst = items[np.arange(len(p)), p.argmin(axis=1)]
        assert (best == np.where(late, best_after, best_before)).all()
        assert (worst == np.where(late, best_before, best_after)).all()


def test_items_live_for_two_days_and_keep_what_they_are() -> None:
    facts: dict[int, set[tuple[int, float]]] = {}
    spans: dict[int, list[int]] = {}
    stars = star_ids(3)
    for part in LOG.splits.values():
        times = np.broadcast_to(part.request_time[:, :, None], part.probability.shape)
        columns = (part.candidates["item_id"], part.candidates["category_id"], part.probability, times)
        for item, category, p, time in zip(*(column.reshape(-1).tolist() for column in columns), strict=True):
            if item not in stars:
                facts.setdefault(item, set()).add((category, round(p, 9)))
                spans.setdefault(item, []).append(time)
        for item, time in zip(
            part.history["item_id"].reshape(-1), part.history_time.reshape(-1), strict=True
        ):
            spans.setdefault(int(item), []).append(int(time))
    assert all(len(each) == 1 for each in facts.values())
    assert all(max(span) - min(span) < 2 * DAY for item, span in spans.items() if item not in stars)
    assert len(spans) > 5 * 60 and min(spans) < 0


def test_the_log_says_when_and_has_raw_ids(tmp_path: Path) -> None:
    manifest = synth(tmp_path / "log", "flip", 3, 12)
    info, facts = manifest.features["item_id"], manifest.ingest["synth"]
    assert info.raw and info.rows == 1 and not manifest.features["category_id"].raw
    assert (facts["best_before"], facts["best_after"]) == star_ids(3) and facts["flip"] == FLIP
    assert [file.name for file in (tmp_path / "log" / VOCABULARIES).iterdir()] == ["category_id.parquet"]
    assert manifest.splits["train"].candidates == 12 * CANDIDATES
