"""What a config may say of similarities, and what becomes of it: features, tables, lines, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from embeddings.errors import ConfigError
from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.similarity import drawn_vectors, write_parquet
from trainer.assemble import id_bounds, resolve_groups
from trainer.checkpoint.compatible import check_resumable, log_fingerprint
from trainer.checkpoint.same_vectors import changed_vectors, vector_lines
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.data.similarity.encoding import encoder_of, features_of_tables, similarity_features
from trainer.data.similarity.loading import load_vectors
from trainer.log.encoders.code import codes_of_reals
from trainer.log.schema import LogManifest, read_manifest
from trainer.loop.remarks import remarks
from trainer.run_config import Config
from trainer.step_size import lookups, step_size

TO_BANDS = "data.similarity.near.to=bands"
NEAR = ("data.similarity.near.of=items", "data.similarity.near.to=items")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings")
    write_log(path / "log", {"train": enrich(random_rows(4, Shape(users=6)), 5)}, rich=True)
    write_parquet(path / "items.parquet", drawn_vectors(1, range(1, 60)))
    write_parquet(path / "bands.parquet", drawn_vectors(1, range(1, 5)), "band")
    write_parquet(path / "wide.parquet", drawn_vectors(1, range(1, 9), dim=7))
    return path


def made(folder: Path, *overrides: str) -> tuple[Config, LogManifest]:
    files = [f"data.vectors.items.file={folder / 'items.parquet'}"]
    config = preset("dare", folder / "log", *files, *NEAR, *overrides)
    return config, read_manifest(folder / "log")


def data_of(**similarity: Any) -> DataConfig:
    given = {"of": "items", "to": "items", **similarity}
    return DataConfig.model_validate({"vectors": {"items": {}}, "similarity": {"near": given}})


def test_a_group_that_names_a_similarity_has_its_parts(folder: Path) -> None:
    named = 'groups.representation.features=["item_id", "near"]'
    config, manifest = made(folder, named, 'groups.attention.features=["item_id"]')
    groups = resolve_groups(config, manifest)
    tables = {table.feature: table.rows for table in groups["representation"].tables}
    parts = {name: info.rows for name, info in similarity_features(config.data).items()}
    assert tables == {"item_id": 60, **parts}
    assert list(parts) == ["near_base_2", "near_base_3", "near_base_10"]
    size = step_size(config.data, manifest)
    asked = lookups(config, groups, manifest, size, "full")
    # Candidates alone have digits: seven and a sign in base 2, of numbers from -100 to 100.
    assert asked["representation__near_base_2"].ids == 8 * size.candidates
    assert asked["representation__item_id"].ids == size.behaviors + size.candidates
    reader = SequenceLogReader(config.data, "train", id_bounds(groups, config))
    assert [*reader.columns.features] == ["item_id"] and len(reader.columns.similarities) == 1
    # Left out, a group has all of them; buckets and tiers are one feature.
    config, manifest = made(folder, "data.similarity.near.encoder=buckets", "data.similarity.near.step=0.1")
    assert {t.feature: t.rows for t in resolve_groups(config, manifest)["attention"].tables}["near"] == 22
    assert [info.rows for info in similarity_features(data_of(statistic="histogram", tiers=4)).values()] == [
        81
    ]


@pytest.mark.parametrize("step", [1.0, 0.4, 0.3, 0.05, 0.01, 0.007])
@pytest.mark.parametrize("kind", ["mnse", "buckets"])
def test_no_cosine_lies_outside_of_the_encoder(kind: str, step: float) -> None:
    encoder = encoder_of(data_of(encoder=kind, step=step, bases=(10,)).similarity["near"])
    values = [-1.0, *(place / 50 - 1 for place in range(1, 100)), 1.0, float("nan")]
    for value in values:
        codes = codes_of_reals(np.array([value]), step)
        (bags,) = encoder.encode(codes).values()
        (rows,) = encoder.parts("near").values()
        assert bags.values.max() < rows
        assert (bags.values.tolist() == [0]) == math.isnan(value), value
        # The id 1 alone is overflow in mnse, and the first bucket else.
        assert kind == "buckets" or bags.values.tolist() != [1]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.similarity.near.to=users"], "data.similarity.near.to = 'users': there are no such vectors"),
        (["data.similarity.near.step=2"], "data.similarity.near.step"),
        (["data.similarity.near.bases=[2,3,2]"], "names one base twice"),
        (["data.similarity.near.statistic=median"], "'max', 'mean', 'top' or 'histogram'"),
    ],
)
def test_settings_that_contradict_each_other(folder: Path, overrides: list[str], problem: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=problem):
        made(folder, *overrides)


def test_names_keys_and_widths_that_do_not_fit(folder: Path) -> None:
    config, manifest = made(folder)
    (settings,) = config.data.similarity.values()
    named = config.data.model_copy(update={"similarity": {"tags": settings}})
    with pytest.raises(ConfigError, match=r"data\.similarity\.tags: the log has a feature 'tags'"):
        features_of_tables(named, manifest)
    for changes, problem in (
        (
            ["data.vectors.items.key=action"],
            "near.of = 'items': its key is 'action', which candidates",
        ),
        (
            [f"data.vectors.bands.file={folder}/bands.parquet", "data.vectors.bands.key=band", TO_BANDS],
            r"near\.to = 'bands': its key is 'band', which only candidates have",
        ),
        (
            [f"data.vectors.wide.file={folder}/wide.parquet", "data.similarity.near.to=wide"],
            "vectors of 'items' have 6 numbers, those of 'wide' 7",
        ),
    ):
        more = ["data.vectors.items.id_column=item_id"] if "action" in changes[0] else []
        config, manifest = made(folder, *changes, *more)
        with pytest.raises(ConfigError, match=problem):
            SequenceLogReader(config.data, "train", None)


def test_what_is_not_used_is_told(folder: Path) -> None:
    own = 'groups.representation.features=["item_id"]'
    config, manifest = made(
        folder,
        own,
        'groups.attention.features=["item_id"]',
        "data.vectors.more.key=item_id",
        "data.similarity.near.top=4",
        "data.similarity.near.tiers=7",
    )
    told = "\n".join(remarks(config, manifest, resolve_groups(config, manifest)))
    assert "not used: data.similarity.near; name it in groups.<name>.features" in told
    assert "data.vectors.more (no similarity and no group names it)" in told
    assert 'data.similarity.near.top (statistic is "max")' in told
    assert 'data.similarity.near.tiers (statistic is "max")' in told


def test_a_run_goes_on_with_the_same_meaning_of_ids_and_tells_of_other_vectors(folder: Path) -> None:
    config, manifest = made(folder)
    fingerprint = log_fingerprint(manifest)
    state = {"log": fingerprint, "config": config.model_dump(mode="json"), "cursor": {"blocks": 0}}
    moved, _ = made(folder, f"data.vectors.items.file={folder / 'elsewhere.parquet'}")
    check_resumable(state, moved, fingerprint, manifest.tasks)
    other, _ = made(folder, "data.similarity.near.step=0.02")
    with pytest.raises(ConfigError, match=r"started with data\.similarity\.near\.step = 0\.01, now"):
        check_resumable(state, other, fingerprint, manifest.tasks)
    loaded = load_vectors(config.data, manifest)
    known = {"vectors": {"items": loaded["items"].digest}}
    assert changed_vectors({}, loaded, "") == [] == changed_vectors(known, loaded, "step-1")
    first, second = vector_lines({"vectors": {"items": "0"}}, loaded, "step-00000001")
    assert "items.parquet: 51 of 59 ids of item_id in the log have a vector; 8 vector(s) of zeros" in first
    assert second == (
        "data.vectors.items: the vectors are others than those that step-00000001 was trained with"
    )
