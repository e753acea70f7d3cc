"""The line below the tables that an ingest measured without any history."""

from __future__ import annotations

from trainer.quality.history_free import history_free_entry, history_free_line

MEASURED = {
    "task": "click",
    "auc": {"train": 0.51, "test": 0.5312},
    "popularity": {"train": 0.5, "test": 0.4833},
    "candidates": {"train": 100_123, "test": 50_012},
    "id_order": None,
}


def test_the_line_is_of_the_split_that_is_measured() -> None:
    report = {"history_free": MEASURED}
    assert history_free_entry("test", report) == {
        "task": "click",
        "auc": 0.5312,
        "popularity": 0.4833,
        "candidates": 50_012,
    }
    assert history_free_line("test", report) == [
        "click without any history, at ingest: AUC 0.5312 of a small tree on the candidates alone,"
        " 0.4833 of popularity as of the request (50,012 candidates of test)"
    ]


def test_a_split_or_a_log_without_the_number_has_no_line() -> None:
    for report in ({}, {"history_free": {}}, {"history_free": MEASURED}):
        assert history_free_entry("validation", report) == {}
        assert history_free_line("validation", report) == []
