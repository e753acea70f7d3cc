"""The scorer over padded tensors gives the snapshot's scores, with the operators that an export records."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from embeddings.errors import SnapshotError
from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import published
from tests.helpers.snapshots import exported, save_run
from tests.trainer.test_presets import log_of_tasks, preset_log
from trainer.portable.building import Portable, portable_of
from trainer.portable.cuts import of_request
from trainer.portable.parity import Comparison
from trainer.portable.requests import Arrays
from trainer.snapshot import load_snapshot


def rich_log(path: Path) -> Path:
    """Lists of ids, features of one side only, context, numbers."""
    rows = enrich(random_rows(4, Shape(users=6)), 5)
    return write_log(path, {"train": rows, "validation": rows[:3]}, rich=True)


_CONTEXT = ("groups.context.dim=4", "model.roles.context=context")
# Padding is as wide as what a branch keeps.
_FEW = ("model.branches.recent.k=3",)
CASES = {
    "dsi_tin": (preset_log, ()),
    "tdpe": (preset_log, ("model.time=encoding",)),
    "twin": (preset_log, _FEW),
    "eta": (preset_log, ()),
    "best": (preset_log, ("data.recent=3", *_FEW)),
    "td_sasrec": (preset_log, ()),
    "hstu": (preset_log, ()),
    "vista": (preset_log, _FEW),
    "muse": (preset_log, _FEW),
    "stca": (preset_log, ()),
    "longer": (preset_log, ("model.recent=2",)),
    "crocodile": (log_of_tasks, ()),
    "twin_hard": (rich_log, _CONTEXT),
    "dare": (rich_log, _CONTEXT),
}


def by_eager(portable: Portable, inputs: Arrays) -> object:
    with torch.no_grad(), patch("torch.compiler.is_exporting", lambda: True):
        return portable.scorer(*(torch.from_numpy(part) for part in inputs.values())).numpy()


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[object, Path]:
    folder = tmp_path_factory.mktemp("logs")
    return {make: make(folder / make.__name__) for make in (preset_log, log_of_tasks, rich_log)}


# Narrow tables are written by an export alone.
DTYPES = {"dare": "int8", "twin_hard": "fp16"}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_snapshot_in_any_shape(
    name: str, logs: dict[object, Path], tmp_path: Path
) -> None:
    make, overrides = CASES[name]
    if dtype := DTYPES.get(name):
        run = save_run(tmp_path / "run", logs[make], name, *overrides)
        version = exported(run, tmp_path / "snap", dtype, dtype)
    else:
        version = published(preset(name, logs[make], *overrides), tmp_path / "snap")
    portable = portable_of(load_snapshot(version))
    compared = Comparison(portable, lambda inputs: by_eager(portable, inputs), tmp_path).of_recorded()  # type: ignore[arg-type, return-value]
    assert compared.candidates == portable.snapshot.recorded.batch.candidates
    assert compared.worst <= 1e-6


def test_a_difference_is_an_error_that_says_where(logs: dict[object, Path], tmp_path: Path) -> None:
    version = published(preset("dare", logs[preset_log]), tmp_path / "snap")
    portable = portable_of(load_snapshot(version))
    batch = portable.snapshot.recorded.batch
    first = portable.arrays(of_request(batch, 0))

    def off(inputs: Arrays) -> object:
        scores = portable.expected(batch, inputs)
        scores[1, 2] += 1e-4
        return scores

    assert first["candidate_length"].size == 1
    expected = rf"request {int(batch.request_id[1])} \(recorded\), candidate 2, task click: .* off by 0.0001"
    with pytest.raises(SnapshotError, match=expected):
        Comparison(portable, off, tmp_path).of_recorded()  # type: ignore[arg-type]


def test_a_search_by_a_network_is_refused(logs: dict[object, Path], tmp_path: Path) -> None:
    version = published(preset("din", logs[preset_log], "model.search=dot"), tmp_path / "snap")
    with pytest.raises(SnapshotError, match='no portable form: a search by score = "mlp"'):
        portable_of(load_snapshot(version))
