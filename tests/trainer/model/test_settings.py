"""Settings of the models and files that extend others: every refusal says what is wrong and what to do."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import ConfigError
from trainer.run_config import Config, build_groups, load_config

CONFIGS = Path(__file__).parents[3] / "configs"

ROWS = {"item_id": 100, "category_id": 10, "action": 4}
GROUPED = {"time_group": "category_id"}
SOFT = {"search": "soft", "auxiliary": "index", "lookup": "full"}
SASREC = {"sequence": "sasrec", **GROUPED}
HEADS = {"heads": 2, "projection": "heads"}


def made(model: dict[str, Any], **tree: Any) -> Config:
    """The config that is read from `run.toml`, a file with this section [model] and these others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.toml")
        path.write_text("\n".join(toml_lines("", {"model": model, **tree})), encoding="utf-8")
        return load_config(path)


def toml_lines(place: str, value: Any) -> Iterator[str]:
    """`a.b.c = 1` for each leaf. JSON writes text, numbers and lists as TOML does."""
    if not isinstance(value, dict) or not value:
        yield f"{place} = {json.dumps(value)}"
        return
    for key, inner in value.items():
        yield from toml_lines(f"{place}.{key}" if place else key, inner)


EXPERTS = {"head": "experts"}
SOFTMAX = {"kind": "softmax"}
BRANCH_REFUSALS = [
    *(
        ({"clusters": True, **other}, 'clusters goes with search = "dot" or "all"')
        for other in ({"search": "recent"}, {"search": "simhash"})
    ),
    ({"search": "hard"}, 'search = "hard" needs match, the feature to compare'),
    ({"match": "category_id"}, 'match is only used by search = "hard"'),
    ({"time_target": "target"}, 'time_target = "target" needs time_group, a feature of candidates'),
    ({"time_target": "joint"}, 'time_target = "joint" needs time_group, a feature of candidates'),
    ({"sequence": "sasrec"}, 'sequence = "sasrec" needs time_group, the feature that groups candidates'),
    ({"heads": 2}, 'heads > 1 needs projection = "heads"'),
    ({"heads": 2, "projection": "feature"}, 'heads > 1 needs projection = "heads"'),
    *(
        ({"time": "encoding", **other}, 'time = "encoding" does not go with a projection or score = "mlp"')
        for other in ({"projection": "feature"}, {"projection": "heads"}, {"score": "mlp"})
    ),
    ({"score": "mlp", "projection": "feature"}, 'projection does not go with score = "mlp"'),
    *(
        ({"time": "concat", **other}, 'time = "concat" goes with sequence = "attention"')
        for other in ({"sequence": "stacked"}, {"sequence": "collision"})
    ),
    ({"time": "concat", "time_target": "joint", "time_group": "a"}, 'time = "concat" takes time_target'),
    (
        {"time": "encoding", "time_tables": "group", "attend": ["a"]},
        'time_tables = "group" with time = "encoding" scores whole vectors: leave out attend',
    ),
    *(
        ({"roles": {"cross": "c"}, "cross_in": ["values"], **other}, 'cross_in with "values" needs sequence')
        for other in ({}, {"sequence": "stacked"}, {"sequence": "collision", **HEADS})
    ),
    ({"sequence": "stacked", **HEADS}, 'sequence = "stacked" takes one head'),
    *(
        ({"attend": [], **other}, 'attend = [] leaves time alone to score: it goes with score = "dot"')
        for other in (
            {"score": "mlp"},
            {"projection": "feature"},
            HEADS,
            {"search": "simhash"},
            {"sequence": "collision"},
        )
    ),
    ({"sequence": "collision", "hash_bits": 13}, 'sequence = "collision" keeps hash_bits at 12 at most'),
    (
        {"sequence": "collision", "hashes": 512, "hash_bits": 12},
        'sequence = "collision": hashes = 512 of hash_bits = 12 are 2,097,152 buckets, 8.4 MB for every '
        "behavior of every request",
    ),
]
BRANCH_REFUSALS += [
    ({"sequence": "hstu", key: False}, 'sequence = "hstu" has a bias of places and of ages in any case')
    for key in ("position", "age")
]
BRANCH_REFUSALS += [
    ({"roles": {"cross": "attention"}, "cross_in": []}, "cross_in = [] leaves roles.cross to nobody"),
    ({"sequence": "hstu", "time_target": "joint", **GROUPED}, 'sequence = "hstu" has time_target = "shared"'),
]
MODEL_REFUSALS = [
    ({"branches": {"main": {}}}, 'branches.main: the section [model] is the branch "main" itself'),
    ({"auxiliary": "softmax"}, 'auxiliary needs lookup = "full"'),
    ({**SOFT, "lookup": "selected"}, 'auxiliary needs lookup = "full"'),
    ({"auxiliary": "index", "lookup": "full"}, 'auxiliary = "index" goes with search = "soft"'),
    ({"search": "soft"}, 'auxiliary = "index" goes with search = "soft", and search = "soft" with it'),
    *(
        ({**SOFT, **other}, 'search = "soft" goes with sequence = "attention", "stacked" or "muse"')
        for other in ({"sequence": "collision"}, SASREC)
    ),
    ({**SOFT, "attend": []}, "attend = [] leaves time alone to score"),
    *(
        (
            {"auxiliary": "softmax", "lookup": "full", **other},
            'auxiliary = "softmax" needs sequence = "attention" with one head',
        )
        for other in ({"sequence": "stacked"}, {"sequence": "collision"}, HEADS)
    ),
    ({"head": "dot"}, 'head = "dot" goes with sequence = "sasrec" and no further branches'),
    (
        {"head": "dot", **SASREC, "branches": {"recent": {"search": "recent"}}},
        'head = "dot" goes with sequence = "sasrec" and no further branches',
    ),
    (
        {"branches": {"other": {"search": "soft"}}},
        'branches: search = "soft" is only trained in the main branch',
    ),
    ({**SOFT, "branches": {"other": {}}}, 'branches: search = "soft" is only trained in the main branch'),
    ({**EXPERTS, "norm": "batch"}, 'norm = "batch" goes with head = "mlp"'),
    *(
        (
            {**EXPERTS, "experts": {"hidden": [], **other}},
            "experts.hidden = [] passes on what an expert reads",
        )
        for other in ({"net": "cross"}, {"layers": 2})
    ),
    *(
        (
            {**EXPERTS, "experts": {"foreign": foreign}},
            f'experts.foreign = "{foreign}" is about experts of tasks',
        )
        for foreign in ("stopped", "hidden")
    ),
    *(
        ({**EXPERTS, "experts": {key: value}}, f"experts.{key} is only used by the covariance loss")
        for key, value in {"covariance_over": "step", "covariance_rows": 64}.items()
    ),
    *(
        (
            {**EXPERTS, "mixer": {"kind": "sum", key: value}},
            f'mixer.{key} is about gates, and mixer.kind = "sum"',
        )
        for key, value in {"axis": "element", "gate": "prior", "hidden": [8], "per": "domain"}.items()
    ),
    *(
        ({**EXPERTS, **sections}, f"{key} needs a group that is the prior: set roles.prior")
        for key, sections in {
            'mixer.gate = "prior"': {"mixer": {**SOFTMAX, "gate": "prior"}},
            "towers.gated = true": {"towers": {"gated": True}},
            "towers.gate_inputs = true": {"towers": {"gate_inputs": True}},
        }.items()
    ),
    *(
        ({"roles": {role: "attention"}, **other}, "roles.prior and roles.prior_context are read by no gate")
        for role in ("prior", "prior_context")
        for other in ({}, EXPERTS, {**EXPERTS, "mixer": SOFTMAX})
    ),
]


@pytest.mark.parametrize(("model", "message"), BRANCH_REFUSALS)
def test_branches_that_cannot_be_are_refused(model: dict[str, Any], message: str) -> None:
    """In the main branch and in any other, which says its name."""
    with pytest.raises(ConfigError, match=f"run.toml: model: {re.escape(message)}"):
        made(model)
    with pytest.raises(ConfigError, match=rf"run.toml: model\.branches\.other: {re.escape(message)}"):
        made({"branches": {"other": model}})


@pytest.mark.parametrize(("model", "message"), MODEL_REFUSALS)
def test_models_that_cannot_be_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"run.toml: model: {re.escape(message)}"):
        made(model)


@pytest.mark.parametrize(
    "model",
    [
        {**EXPERTS, "experts": {"hidden": [], "covariance": 0.1, "covariance_rows": 8, "shared": 2}},
        {**EXPERTS, "experts": {"own": 1, "foreign": "stopped"}, "mixer": {**SOFTMAX, "axis": "element"}},
        {**EXPERTS, "mixer": {**SOFTMAX, "gate": "prior"}, "roles": {"prior": "attention"}},
        {**EXPERTS, "towers": {"gated": True}, "roles": {"prior_context": "attention"}},
        {"search": "hard", "match": "category_id"},
        {"time_target": "joint", **GROUPED},
        {**SASREC, "heads": 2, "head": "dot"},
        {**HEADS},
        {"time": "encoding", "sequence": "stacked"},
        {"score": "mlp"},
        {"attend": [], "search": "all"},
        {"attend": [], **SASREC},
        {"sequence": "collision", "hash_bits": 12},
        {"hash_bits": 256, "search": "simhash"},
        {"auxiliary": "softmax", "lookup": "full"},
        {**SOFT, "branches": {"recent": {"search": "recent"}}},
    ],
)
def test_their_neighbours_are_accepted(model: dict[str, Any]) -> None:
    assert made(model).model.model_dump(include=set(model))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"k": 0}, "model.k: .*greater than or equal to 1"),
        ({"hash_bits": 5000}, "model.hash_bits: .*less than or equal to 4096"),
        ({"head_dim": 0}, "model.head_dim: .*greater than or equal to 1"),
        ({"auxiliary_weight": 0}, "model.auxiliary_weight: .*greater than 0"),
        ({"attend": "item_id"}, r'model.attend: must be a list, such as \["a", "b"\]'),
        ({"time_in": ["score"]}, "model.time_in.0: .*'scores' or 'values'"),
        ({"branches": {"Wide": {}}}, "model.branches.Wide: must be a name: a small letter"),
        ({"branches": {"other": 5}}, "model.branches.other: must be a section, a table of keys"),
        ({"branches": 5}, r"model.branches: has a section for each name: write \[model.branches.NAME\]"),
        (
            {"branches": {"other": {"atend": []}}},
            "unknown key 'model.branches.other.atend'; did you mean 'model.branches.other.attend'?",
        ),
        ({"branches": {"other": {"hidden": [8]}}}, "unknown key 'model.branches.other.hidden'"),
    ],
)
def test_values_that_cannot_be_are_named(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(model)


def test_branches_take_from_the_model_what_they_do_not_set() -> None:
    model = made(
        {
            "k": 7,
            "weights": "sigmoid",
            "roles": {"attention_target": "representation", "attention_behavior": "representation"},
            "branches": {"other": {"k": 3, "roles": {"attention_target": "attention"}}},
        }
    ).model
    other = model.all_branches()["other"]
    assert (model.all_branches()["main"].k, other.k, other.weights) == (7, 3, "sigmoid")
    assert (other.roles.attention_target, other.roles.attention_behavior) == ("attention", "representation")
    again = Config.model_validate(Config(model=model).model_dump(mode="json")).model
    assert again == model


def test_towers_of_tasks_need_a_head_that_has_them() -> None:
    towers = {"tasks": {"click": {"tower": [8]}}}
    message = 'tasks.click.tower: model.head = "mlp" has no tower for each task'
    with pytest.raises(ConfigError, match=re.escape(message)):
        made({"head": "mlp"}, **towers)
    assert made(EXPERTS, **towers).tasks["click"].tower == (8,)


RECENT = {"search": "recent", "k": 7, "clusters": False}
CLUSTERED = {"data": {"clusters": True}}
ROLE = {"roles": {"attention_target": "nope"}}


@pytest.mark.parametrize(
    ("model", "tree", "message"),
    [
        (
            ROLE,
            {},
            "model.roles.attention_target names group 'nope'; defined groups: attention, representation",
        ),
        ({"branches": {"other": ROLE}}, {}, "model.branches.other.roles.attention_target names group 'nope'"),
        ({"roles": {"cross": "nope"}}, {}, "model.roles.cross names group 'nope'"),
        ({"roles": {"context": "nope"}}, {}, "model.roles.context names group 'nope'"),
        ({"roles": {"attention_target": ""}}, {}, "model.roles.attention_target names group ''"),
        (
            {"level": True},
            {},
            "model.level needs a hard search while reading: set data.search.levels",
        ),
        ({"branches": {"other": {"level": True}}}, {}, "model.level needs a hard search while reading"),
        ({"clusters": True}, {}, "model.clusters needs data.clusters = true"),
        ({}, CLUSTERED, "data.clusters leaves branch 'main' no single behaviors: set its clusters too"),
        (
            {"clusters": True},
            {"data": {"clusters": True, "search": {"levels": ["category_id"]}}},
            "data.clusters and data.search.levels both cut the history; use one",
        ),
        (
            {"clusters": True, "branches": {"recent": RECENT}},
            {"data": {"clusters": True, "recent": 6}},
            "branch 'recent' looks at the 7 newest behaviors, .* set data.recent = 7",
        ),
        (
            {"branches": {"recent": RECENT}},
            {"data": {"search": {"levels": ["category_id"]}}},
            "branch 'recent' looks at the 7 newest behaviors, .* set data.recent = 7",
        ),
        (
            {},
            {"groups": {"attention": {}, "representation": {}, "idle": {}}},
            "group 'idle' serves no role; remove it or name it in model.roles",
        ),
        ({}, {"groups": {"Bad": {}}}, "groups.Bad: must be a name: a small letter"),
    ],
)
def test_roles_and_groups_that_do_not_fit_are_named(
    model: dict[str, Any], tree: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(model, **tree)


def test_what_reads_as_the_model_wants_is_accepted() -> None:
    assert made({"level": True}, data={"search": {"levels": ["category_id"]}}).model.level
    beside = {"clusters": True, "branches": {"recent": RECENT}}
    assert made(beside, data={"clusters": True, "recent": 7}).data.recent == 7


FEW = {"attention": {"features": ["item_id"]}, "representation": {}}
CONTEXT = {"roles": {"context": "request"}}


@pytest.mark.parametrize(
    ("model", "groups", "message"),
    [
        (
            {"attend": ["category_id"]},
            FEW,
            "model.attend: group attention has no feature 'category_id'; it has item_id",
        ),
        (
            {"branches": {"other": {"attend": ["category_id"]}}},
            FEW,
            "model.attend: group attention has no feature 'category_id'; it has item_id",
        ),
        (
            {"search": "hard", "match": "action"},
            {name: {"features": ["item_id"]} for name in FEW},
            "model.match: no group has a table of 'action'; tables: item_id",
        ),
        (
            {"time_target": "target", "time_group": "brand"},
            {"attention": {}, "representation": {}},
            "model.time_group: no group has a table of 'brand'; tables: action, category_id, item_id",
        ),
        (
            CONTEXT,
            {"attention": {}, "representation": {}, "request": {}},
            "groups.request: the log has no context features; leave model.roles.context empty",
        ),
        (
            CONTEXT,
            {"attention": {}, "representation": {}, "request": {"features": ["item_id"]}},
            "groups.request.features: the log has no feature 'item_id'; it has ",
        ),
        (
            {},
            {
                "attention": {"dim": {"item_id": 4, "action": 4}, "features": ["item_id"]},
                "representation": {},
            },
            "groups.attention.dim gives a width for 'action', which is no feature of the group",
        ),
        (
            {},
            {
                "attention": {"dim": dict.fromkeys(ROWS, 4) | {"action": 8}, "fusion": "sum"},
                "representation": {},
            },
            'groups.attention: fusion = "sum" needs tables of one width, not item_id 4, .*, action 8',
        ),
        (
            {"attend": ["item_id"]},
            {"attention": {"fusion": "sum"}, "representation": {}},
            "model.attend: group attention sums its features .* give the attended ones a group of their own",
        ),
        (
            {"roles": {"representation_behavior": "attention"}},
            {"attention": {"dim": 8}, "representation": {"dim": 16}},
            r"representation_target \(representation\) and representation_behavior \(attention\) need tables "
            r"of equal widths in equal order, not \(16, 16, 16\) and \(8, 8, 8\)",
        ),
    ],
)
def test_what_the_log_does_not_have_is_named(
    model: dict[str, Any], groups: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_groups(made(model, groups=groups), ROWS)


def test_context_groups_have_the_requests_features_alone() -> None:
    config = made(CONTEXT, groups={"attention": {}, "representation": {}, "request": {}})
    groups = build_groups(config, ROWS, {"city": 7})
    assert groups["request"].features == ["city"] and groups["attention"].features == list(ROWS)


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_file_lies_over_what_it_extends(tmp_path: Path) -> None:
    """Table by table, a chain of files, each path beside the file that names it."""
    written(
        tmp_path,
        top='extends = "base/middle.toml"\n[model]\nk = 3\n[groups.attention]\ndim = 4',
        base__middle='extends = "low.toml"\n[model]\nk = 5\nnorm = "batch"\n[groups.attention]\neps = 0.5',
        base__low="[model]\nk = 9\nhidden = [8]\n[groups.attention]\ndim = 8\n[groups.representation]",
    )
    config = load_config(tmp_path / "top.toml", ["model.hidden=[16]"])
    assert (config.model.k, config.model.norm, config.model.hidden) == (3, "batch", (16,))
    assert (config.groups["attention"].dim, config.groups["attention"].eps) == (4, 0.5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": 'extends = "top.toml"'}, r"top\.toml: extends top\.toml, which leads back to itself"),
        (
            {"top": 'extends = "sub/other.toml"', "sub__other": 'extends = "../top.toml"'},
            r"other\.toml: extends \.\./top\.toml, which leads back to itself",
        ),
        ({"top": 'extends = "none.toml"'}, r"none\.toml: no such file, which .*top\.toml extends"),
        ({"top": 'extends = "bad.toml"', "bad": "data = ["}, r"bad\.toml: not readable as TOML"),
        ({"top": 'extends = ["a.toml"]'}, r"top\.toml: extends must be the path of one file"),
        (
            {"top": "extends = 5"},
            r'top\.toml: extends must be the path of one file, such as "base/common\.toml"',
        ),
        ({"top": 'extends = "."'}, r"not readable as TOML: .*directory"),
    ],
)
def test_files_that_extend_nothing_are_refused(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, **files) / "top.toml")


def test_sasrec_needs_fitting_heads_and_recent_behaviors() -> None:
    with pytest.raises(ConfigError, match="heads = 5 does not divide the representation"):
        build_groups(load_config(CONFIGS / "td_sasrec.toml", ["model.heads=5"]), {"a": 5, "category_id": 3})
    with pytest.raises(ConfigError, match='set search = "recent"'):
        load_config(
            CONFIGS / "td_sasrec.toml",
            ["model.search=dot", 'data.search.levels=["category_id"]', "model.k=5"],
        )


def test_longer_without_inner_attention_splits_merged_tokens_alone() -> None:
    rows, given = {"a": 5, "category_id": 3}, ["groups.shared.dim=4", "model.heads=16", "model.token_width=0"]
    build_groups(load_config(CONFIGS / "longer.toml", [*given, "model.merge=4", "model.inner=false"]), rows)
    with pytest.raises(ConfigError, match="heads = 16 does not divide the merged token's width 24"):
        build_groups(
            load_config(CONFIGS / "longer.toml", [*given, "model.merge=3", "model.inner=false"]), rows
        )
    with pytest.raises(ConfigError, match="heads = 16 does not divide the representation's width 8"):
        build_groups(load_config(CONFIGS / "longer.toml", given), rows)


@pytest.mark.parametrize("preset", ["stca", "longer", "hstu", "vista", "td_sasrec", "sdim"])
def test_scores_are_none_of_a_branch_that_reads_whole_windows(preset: str) -> None:
    keys = {"time", "score", "weights", "projection", "attention_owner"}
    model = load_config(CONFIGS / f"{preset}.toml", []).model
    assert not keys & model.all_branches()["main"].keys_with_effect()
    assert keys <= load_config(CONFIGS / "dare.toml", []).model.all_branches()["main"].keys_with_effect()


def test_a_branch_with_its_own_search_inherits_no_match() -> None:
    config = load_config(CONFIGS / "twin_hard.toml", ["model.branches.recent.search=recent"])
    assert config.model.match and config.model.branches["recent"].match == ""
