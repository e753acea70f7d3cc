"""Trainings whose ids come and go: the same maps and rows on any ranks, with any pipeline, after any stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.ids.rules import IdRules
from embeddings.ids.stage import IdStage
from embeddings.lookup.jagged import one_id_bags
from tests.helpers.launching import reported
from tests.helpers.steps import drawn
from trainer.checkpoint.id_files import IdFiles
from trainer.data.reader import Step
from trainer.loop.living import LivingIds

RULES = {"item_id": IdRules(capacity=12, shared_rows=3, ttl=40)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = reported("tests.programs.living_runs", tmp_path_factory.mktemp("living"))
    return found


def test_any_ranks_and_pipelines_have_one_map(report: dict[str, Any]) -> None:
    """At every save: with what a pipeline reads ahead, validations, a stop, and other ranks than before."""
    expected = report["maps"]["one"]
    assert list(expected) == ["step-00000004", "step-00000008"]
    for name, found in report["maps"].items():
        assert {step: found[step] for step in expected} == expected, name
    assert report["stopped after"] not in (4, 8)


def test_rows_begin_anew_alike(report: dict[str, Any]) -> None:
    """Gradients are added up in another order on other ranks; with the same ranks every bit is the same."""
    assert max(report["apart"].values()) < 1e-3
    assert report["digests"]["two"] == report["digests"]["stopped"]


def test_what_became_of_ids_is_reported_of_trained_steps_alone(report: dict[str, Any]) -> None:
    expected = report["counts"]["one"]
    assert all(found == expected for found in report["counts"].values())
    totals = {key: sum(each[key] for each in expected) for key in expected[0]}
    assert all(totals[key] for key in ("known", "admitted", "rejected", "evicted", "expired"))
    assert expected[-1]["live"] == totals["admitted"] - totals["evicted"] - totals["expired"]


def test_deltas_hold_rows_of_new_ids(report: dict[str, Any]) -> None:
    deltas = report["deltas"]
    assert [each["base"] for each in deltas.values()] == [None, *list(deltas)[:-1]]
    assert [each["differ"] for each in deltas.values()] == [[]] * 4


def test_maps_follow_phases(report: dict[str, Any]) -> None:
    """Back to the best checkpoint, and through a phase that trains no table."""
    of_two, of_one = report["phased"]["2"], report["phased"]["1"]
    assert of_two == of_one
    (line,) = of_two["lines"]
    trained = len(of_two["counts"])
    # Steps of the map: those until the best ones, and those of the last phase.
    assert of_two["maps"][0]["clock"][1] == int(line.split()[-1].rstrip(".")) + 2
    frozen = of_two["counts"][trained - 4 : trained - 2]
    assert all(sum(each.values()) == each["live"] for each in frozen)


def steps_of(seed: int, count: int) -> list[Step]:
    """Steps whose ids and times are drawn; times rise, so that ids expire."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        step = drawn(seed + number, 9, 1).step()
        features = one_id_bags(["item_id"], torch.from_numpy(rng.integers(-20, 20, (1, 9))))
        times = torch.from_numpy(rng.integers(15 * number, 15 * number + 30, step.batch.requests))
        found.append(replace(step, batch=replace(step.batch, features=features, request_time=times)))
    return found


def state_of(living: LivingIds) -> dict[str, Any]:
    files = living.files()
    return {"clock": files.clock.tolist()} | {k: a.tolist() for k, a in files.states["item_id"].items()}


def trained_plainly(steps: list[Step]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    living = LivingIds(IdStage(RULES), ahead=False)
    with living.steps(steps) as mapped:
        for step in mapped:
            living.trained()
            yield step.features.values().tolist(), state_of(living)


@settings(max_examples=15)
@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 4), st.data())
def test_whatever_is_read_ahead_saves_see_trained_steps_alone(
    seed: int, count: int, depth: int, data: st.DataObject
) -> None:
    steps = steps_of(seed, count)
    expected = list(trained_plainly(steps))
    living, done = LivingIds(IdStage(RULES), ahead=True), 0
    while done < count:
        # A stop drops what is read ahead by then.
        stop = data.draw(st.integers(done + 1, count), label="stop")
        with living.steps(steps[done:]) as mapped:
            read = list[Step]()
            while done < stop:
                while len(read) < depth and (step := next(mapped, None)) is not None:
                    read.append(step)
                assert read.pop(0).features.values().tolist() == expected[done][0]
                living.trained()
                assert state_of(living) == expected[done][1]
                done += 1
        assert state_of(living) == expected[done - 1][1]


def test_frozen_tables_give_no_rows() -> None:
    living = LivingIds(IdStage(RULES), ahead=True)
    before, living.frozen = state_of(living), True
    with living.steps(steps_of(0, 3)) as mapped:
        assert all(step.features.values().max() < 3 and not step.new_rows for step in mapped)
    assert state_of(living) == before


def test_files_are_copies() -> None:
    living = LivingIds(IdStage(RULES), ahead=False)
    files = IdFiles.of(living.stage)
    before = files.states["item_id"]["keys"].copy()
    with living.steps(steps_of(0, 3)) as mapped:
        assert len(list(mapped)) == 3
    assert (files.states["item_id"]["keys"] == before).all()
