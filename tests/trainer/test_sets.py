"""Several sets in a config: what they become, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from embeddings.groups import EmbeddingSet
from trainer.config.tasks import resolve_tasks
from trainer.run_config import Config, build_groups, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = {"item_id": 100, "category_id": 10}
TASKS = {"click": {}, "buy": {}, "both": {"product": ("click", "buy")}}


EXPERTS = "model.head=experts"


def config(*words: str) -> Config:
    return load_config(CONFIGS / "dare.toml", words)


def test_a_number_makes_so_many_shared_sets() -> None:
    group = build_groups(config("groups.representation.sets=3"), ROWS)["representation"]
    assert group.sets == tuple(EmbeddingSet(str(place)) for place in range(3))
    assert group.features == list(ROWS) and len(group.tables) == 6
    assert group.width == 3 * group.of_set("0").width


def test_each_task_with_a_tower_owns_a_set() -> None:
    given = config("groups.representation.sets=tasks", EXPERTS)
    settings = Config.model_validate({"tasks": TASKS}).tasks
    tasks = resolve_tasks(settings, ["click", "buy", "both"])
    group = build_groups(given, ROWS, tasks=tasks)["representation"]
    owners = {"shared": "shared", "click": "task:click", "buy": "task:buy"}
    assert {each.name: each.owner for each in group.sets} == owners


def test_named_sets_have_owners_and_widths_of_their_own() -> None:
    sets = '{all = {}, own = {owner = "task:click", dim = 4}, far = {owner = "domain:9"}}'
    given = config(f"groups.representation.sets={sets}", "data.domain=category_id", EXPERTS)
    tasks = resolve_tasks({}, ["click"])
    group = build_groups(given, ROWS, tasks=tasks)["representation"]
    assert [each.owner for each in group.sets] == ["shared", "task:click", "domain:9"]
    assert [group.of_set(name).width for name in group.set_names] == [32, 8, 32]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["groups.attention.sets=2"],
            "groups.attention.sets: model.roles.attention_target is 'attention', and several sets serve the "
            "representation alone; leave groups.attention.sets out, or name another group",
        ),
        (
            ["groups.representation.sets=2", "model.roles.cross=representation"],
            "groups.representation.sets: model.roles.cross is 'representation', and several sets serve the "
            "representation alone",
        ),
        (
            ["groups.representation.sets=2", "groups.other={}", "model.roles.representation_behavior=other"],
            "groups.representation.sets: several sets serve all representation roles of all branches, but "
            "model.roles.representation_behavior is 'other'; name 'representation' there",
        ),
        (
            ["groups.representation.sets=2", "model.time=concat"],
            'groups.representation.sets: model.time = "concat" puts time beside the vectors of one set; '
            "leave sets out, or set time to another form",
        ),
        (
            ["groups.other.sets=2", "model.roles.representation_behavior=other"],
            "groups.other.sets: model.roles.representation_behavior is 'other', and several sets serve all "
            "representation roles, but model.roles.representation_target is 'representation'",
        ),
        (
            [
                "groups.representation.sets=2",
                "groups.other={}",
                "model.branches.recent.roles.representation_target=other",
                "model.branches.recent.roles.representation_behavior=other",
            ],
            "groups.representation.sets: several sets serve all representation roles of all branches, but "
            "model.branches.recent.roles.representation_target is 'other'",
        ),
        (
            ["groups.representation.sets=2", "groups.representation.kind=sequence"],
            'sets are for kind = "bag"',
        ),
        (["groups.representation.sets={}"], "sets names no set"),
        (["groups.representation.sets=0"], "groups.representation.sets"),
        (
            ['groups.representation.sets={far = {owner = "domain:3"}}'],
            "groups.representation.sets.far.owner = 'domain:3': there are no domains; name the feature",
        ),
        (
            ["groups.representation.sets=tasks"],
            'groups.representation.sets = "tasks": model.head = "mlp" puts all sets side by side, whoever '
            'owns them, so that every task would train them; set model.head = "experts", or give sets no '
            "owner, as groups.representation.sets = 4 does",
        ),
        (
            ['groups.representation.sets={all = {}, own = {owner = "task:click"}}'],
            "groups.representation.sets.own.owner = 'task:click': model.head = \"mlp\" puts all sets side",
        ),
        (
            ['groups.representation.sets={far = {owner = "domain:3"}}', "data.domain=category_id"],
            "groups.representation.sets.far.owner = 'domain:3': model.head = \"mlp\" puts all sets side",
        ),
        (
            [
                "groups.representation.sets=2",
                *("model.head=dot", "model.sequence=sasrec", "model.time_group=category_id"),
            ],
            'groups.representation.sets: model.head = "dot" reads one set; leave sets out',
        ),
    ],
)
def test_sets_that_cannot_work_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ['groups.representation.sets={far = {owner = "domain:10"}}', "data.domain=category_id"],
            "sets.far.owner = 'domain:10': the ids of data.domain are below 10",
        ),
        (
            ['groups.representation.sets={own = {owner = "task:clik"}}'],
            "no task with a tower has that name; did you mean 'click'?",
        ),
        (
            ['groups.representation.sets={own = {owner = "task:both"}}'],
            "no task with a tower has that name; they are click, buy",
        ),
    ],
)
def test_owners_that_are_not_there_are_refused(words: list[str], message: str) -> None:
    tasks = resolve_tasks(Config.model_validate({"tasks": TASKS}).tasks, ["click", "buy", "both"])
    with pytest.raises(ConfigError) as caught:
        build_groups(config(*words, EXPERTS), ROWS, tasks=tasks)
    assert message in str(caught.value)
