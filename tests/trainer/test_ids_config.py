"""The section ids of the configuration: what it says, and what cannot be had with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from trainer.checkpoint.compatible import check_resumable
from trainer.config.ids import IdsConfig, check_features, check_kernels
from trainer.config.tables import GroupConfig
from trainer.loop.living import lines_of
from trainer.run_config import Config, load_config

DARE = Path(__file__).parents[2] / "configs" / "dare.toml"


def config(*words: str) -> Config:
    return load_config(DARE, ["ids.item_id.capacity=1000", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.pipeline=prefetch"], r"train\.pipeline.* fills caches before rows of new ids"),
        (["tables.item_id.rows=99"], r"tables\.item_id\.rows: ids\.item_id\.capacity says"),
        (["data.domain=item_id"], r"ids\.item_id: data\.domain names it"),
        (
            ["model.time_target=target", "model.time_group=item_id"],
            r"ids\.item_id: model\.time_group names it",
        ),
        (
            ['groups.attention.features=["category_id"]', "ids.item_id.groups.attention=20"],
            r"ids\.item_id\.groups\.attention: that group has no table of item_id",
        ),
        (["ids.item_id.half_life_days=1e300"], r"ids\.item_id\.half_life_days"),
        (["ids.item_id.groups.other=20"], r"ids\.item_id\.groups\.other: there is no such group"),
        (
            ['groups.attention.sharding=["data_parallel"]'],
            r"groups\.attention\.sharding: .* cannot give rows",
        ),
        (
            ['plan.tables.attention__item_id.sharding=["data_parallel"]'],
            r"plan\.tables\.attention__item_id\.sharding: .* cannot give rows",
        ),
        (
            ['plan.tables.attention__item_id.kernels=["fused_uvm_caching"]'],
            r"plan\.tables\.attention__item_id\.kernels: .* cannot give rows",
        ),
    ],
)
def test_what_cannot_be_had_with_ids(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*words)


def test_a_plan_must_leave_rows_in_place() -> None:
    kernels = {"attention__item_id": "fused_uvm", "attention__category_id": "fused_uvm_caching"}
    check_kernels(config().ids, kernels)
    with pytest.raises(ConfigError, match=r"table attention__category_id: .* cannot give rows to new ids"):
        check_kernels(["category_id"], kernels)


def test_branches_are_refused() -> None:
    fork = {"every": 2, "branches": [{"name": "a"}, {"name": "b"}]}
    tree = config().model_dump()
    with pytest.raises(ValueError, match=r"phases\.\*\.fork: branches begin at the same rows"):
        Config.model_validate({**tree, "phases": [{"name": "x", "steps": 4, "fork": fork}]})


def test_a_start_says_what_maps_there_are() -> None:
    whole, part, remark = lines_of(
        config("ids.item_id.ttl_days=3", "ids.item_id.groups.attention=500", "ids.item_id.admission=count"), 2
    )
    assert whole == (
        "ids of item_id: up to 990 have rows, others share 64; admission count exact, eviction lru; none "
        "older than 3 days; 0.0 MB of host memory a rank"
    )
    assert part.startswith("ids of item_id@attention: up to ")
    assert 'data.order = "shuffled" reads new ones first' in remark
    assert len(lines_of(config("ids.item_id.ttl_days=3", "data.order=stored"), 1)) == 1


@pytest.mark.parametrize(
    "words", [["ids.item_id.capacity=1001"], ["ids.item_id.shared_rows=9"], ["ids.category_id.capacity=99"]]
)
def test_a_run_keeps_its_rows(words: list[str]) -> None:
    state = {"log": "a", "config": config().model_dump(mode="json"), "cursor": {"epoch": 0, "blocks": 0}}
    check_resumable(state, config("ids.item_id.eviction=never", "ids.item_id.ttl_days=2"), "a")
    with pytest.raises(ConfigError, match=r"this run was started with ids\..* set it back"):
        check_resumable(state, config(*words), "a")


def test_a_misspelt_feature_and_raw_ids_without_a_map_are_named() -> None:
    groups = {"attention": GroupConfig(), "other": GroupConfig(features=("category_id",))}
    with pytest.raises(ConfigError, match=r"ids\.itemid: .* did you mean 'item_id'\?"):
        check_features({"itemid": IdsConfig(capacity=9)}, {"item_id": True, "category_id": False}, groups)
    with pytest.raises(ConfigError, match=r"ids of 'item_id' are raw .*: add \[ids\.item_id\]"):
        check_features({}, {"item_id": True, "category_id": False}, groups)
    check_features({"item_id": IdsConfig(capacity=9)}, {"item_id": True, "category_id": False}, groups)
    check_features({}, {"item_id": True, "category_id": False}, {"other": groups["other"]})
