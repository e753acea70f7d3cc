"""Regression guard of a step's cost by counts, which are the same on every machine; never by times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.launching import launched
from tests.helpers.logs import small_log

Counts = dict[str, int]
# Today's counts of the third step of configs/dare.toml, cut down as in tests/programs/step_cases.py.
LIMITS: dict[int, list[Counts]] = {
    1: [
        {
            "operators": 531,
            "collectives": 1,
            "graph nodes": 60,
            "bytes of ids": 0,
            "bytes of vectors": 0,
            "bytes besides": 0,
            "attention rows": 236,
            "attention bytes": 7552,
            "representation rows": 170,
            "representation bytes": 5440,
        }
    ],
    2: [
        {
            "operators": 595,
            "collectives": 12,
            "graph nodes": 60,
            "bytes of ids": 864,
            "bytes of vectors": 6144,
            "bytes besides": 7280,
            "attention rows": 116,
            "attention bytes": 3712,
            "representation rows": 72,
            "representation bytes": 2304,
        },
        {
            "operators": 595,
            "collectives": 12,
            "graph nodes": 60,
            "bytes of ids": 1440,
            "bytes of vectors": 6144,
            "bytes besides": 7280,
            "attention rows": 120,
            "attention bytes": 3840,
            "representation rows": 90,
            "representation bytes": 2880,
        },
    ],
}
ADVICE = (
    "A step of configs/dare.toml calls, sends or looks up more than before. If that is meant, say in the "
    "commit why it is worth it, and set LIMITS in tests/pipelines/test_step_counts.py to\n"
)


def counted(log: Path, out: Path, ranks: int) -> list[Counts]:
    done = launched("tests.programs.step_counts", str(log), str(out), ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Counts] = json.loads(out.read_text())["ranks"]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Counts]]:
    folder = tmp_path_factory.mktemp("counts")
    log = small_log(folder / "log", seed=2, users=24)
    return {ranks: counted(log, folder / f"{ranks}.json", ranks) for ranks in LIMITS}


@pytest.mark.parametrize("ranks", LIMITS)
def test_a_step_costs_no_more_than_it_did(found: dict[int, list[Counts]], ranks: int) -> None:
    for mine, limit in zip(found[ranks], LIMITS[ranks], strict=True):
        assert mine.keys() == limit.keys()
        more = {name: f"{limit[name]} -> {mine[name]}" for name in mine if mine[name] > limit[name]}
        assert not more, f"{more}\n{ADVICE}{ranks}: {found[ranks]}"


def test_the_counts_see_what_a_step_does(found: dict[int, list[Counts]]) -> None:
    """One rank sends nothing; two send ids, vectors and gradients, and look up as many rows together."""
    (one,), two = found[1], found[2]
    assert one["bytes of ids"] == one["bytes of vectors"] == one["bytes besides"] == 0
    assert all(min(mine["bytes of ids"], mine["bytes of vectors"], mine["bytes besides"]) > 0 for mine in two)
    assert sum(mine["attention rows"] for mine in two) == one["attention rows"]
