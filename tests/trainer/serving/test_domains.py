"""Domains and sample weights of tasks beyond the reader: served requests, and those a snapshot records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embeddings.errors import SnapshotError
from tests.helpers.logs import IN_PART, Row, enrich, observed_in_part, random_rows, write_log
from tests.helpers.models import batch_of, preset
from tests.helpers.serving import bodies, model_body, rows_of, snapshot_of
from trainer.data.batch_file import pack, unpack
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.serving.json_body import JsonForm
from trainer.serving.request import Limits
from trainer.serving.scorer import Scorer
from trainer.snapshot.loading import _problem_of_domains

CITY = (
    'groups.context.features=["city"]',
    "groups.context.dim=4",
    "model.roles.context=context",
)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return observed_in_part(enrich(random_rows(5), 5), 5)


@pytest.fixture(scope="module")
def log(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("domains") / "log", {"train": rows}, rich=True, **IN_PART)


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (("data.domain=band",), True),
        (("data.domain=city", *CITY), True),
        # Without a table: requests do not carry it, and the model does not read it.
        (("data.domain=city",), False),
        ((), False),
    ],
)
def test_requests_have_the_domains_that_the_log_has(
    log: Path, rows: list[Row], words: tuple[str, ...], read: bool
) -> None:
    config = preset("dare", log, "tasks.sold.label=buy", "tasks.sold.mask=click == 1", *words)
    serving = Scorer(snapshot_of(config))
    assert list(serving.columns.tasks) == ["sold"]
    wanted = {}
    tables = rows_of(config)
    for step in SequenceLogReader(config.data, "train", tables).steps():
        batch = step.batch
        for r, name in enumerate(zip(batch.user_id.tolist(), batch.request_id.tolist(), strict=True)):
            if batch.domain is not None:
                wanted[name] = batch.domain[batch.candidate_request == r].tolist()
    given = bodies(read_manifest(log), rows)
    assert len(given) > 20
    for first in range(0, len(given), 3):
        part = given[first : first + 3]
        forms = [JsonForm(model_body(body), serving.needs, None, "request") for _, body in part]
        requests = [form.request({}, Limits()) for form in forms]
        batch = serving.batch(requests)
        assert batch.task_weight is None and batch.labels.shape == (batch.candidates, 1)
        found = None if batch.domain is None else batch.domain.tolist()
        assert found == ([one for name, _ in part for one in wanted[name]] if read else None)


def test_recorded_requests_keep_weights_and_domains(log: Path) -> None:
    whole = batch_of(preset("dare", log, "data.domain=city"))
    assert whole.task_weight is not None and whole.domain is not None
    scores = {"scores": torch.zeros(whole.candidates, 2)}
    for batch in (whole, replace(whole, task_weight=None), replace(whole, task_weight=None, domain=None)):
        # Snapshots of before have neither.
        names = pack(batch).keys()
        assert ("task_weight" in names, "domain" in names) == (
            batch.task_weight is not None,
            batch.domain is not None,
        )
        found, _ = unpack(Path("here"), pack(batch) | scores, (batch.features.keys(), []))
        for name in ("labels", "task_weight", "domain"):
            mine, theirs = getattr(found, name), getattr(batch, name)
            assert (mine is None) == (theirs is None)
            assert theirs is None or torch.equal(mine.nan_to_num(-1), theirs.nan_to_num(-1)), name
        assert found.problem({}, 1000) == ""


def test_recorded_requests_that_do_not_fit_are_refused(log: Path) -> None:
    batch = batch_of(preset("dare", log, "data.domain=city"))
    tensors = pack(batch) | {"scores": torch.zeros(batch.candidates, 2)}
    keys = batch.features.keys(), []
    for name, tensor in (("domain", tensors["domain"].float()), ("task_weight", torch.zeros(3))):
        with pytest.raises(SnapshotError, match=f"{name} is torch.float32 of 1 dimensions"):
            unpack(Path("here"), {**tensors, name: tensor}, keys)
    for name in ("domain", "task_weight"):
        found, _ = unpack(Path("here"), {**tensors, name: tensors[name][1:]}, keys)
        assert found.problem({}, 1000) == "its parts differ in length"


@pytest.mark.parametrize(
    ("domain", "problem"),
    [
        (None, "lacks the domains"),
        (-1, "domains lie outside the table of 5 rows"),
        (5, "domains lie outside"),
    ],
)
def test_a_snapshot_whose_model_may_read_domains_records_them(
    log: Path, domain: int | None, problem: str
) -> None:
    config = preset("dare", log, "data.domain=band")
    manifest: Any = SimpleNamespace(config=config, features=rows_of(config))
    batch = batch_of(config)
    assert batch.domain is not None and _problem_of_domains(batch, manifest) == ""
    other = None if domain is None else torch.full_like(batch.domain, domain)
    assert _problem_of_domains(replace(batch, domain=other), manifest).startswith(problem)
    without: Any = SimpleNamespace(config=config, features={"item_id": 60})
    assert _problem_of_domains(replace(batch, domain=other), without) == ""
