"""The config: presets load, and every mistake is named with its cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from pipelines.ingest.config import load_ingest_config
from trainer.run_config import Config, build_groups, load_config, of_files

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = {"item_id": 100, "category_id": 10}
DIM = "groups.representation.dim"
OWNER = 'must be "shared", "task:NAME" or "domain:ID" with the number of an id'
SETS = "groups.representation.sets"
NAME = "must be a name: a small letter first, then small letters, digits and _"
FORMS = "must be a whole number, 'tasks' or a table of keys, such as { key = \"value\" }"
ROLES = ("attention_target", "attention_behavior", "representation_target", "representation_behavior")


PRESETS = sorted(path.stem for path in CONFIGS.glob("*.toml") if "extends" in path.read_text())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load_and_resolve(preset: str) -> None:
    config = load_config(CONFIGS / f"{preset}.toml")
    rows = {**ROWS, "domain_id": 4} if config.data.domain else ROWS
    groups = build_groups(config, rows)
    named = set().union(*(branch.roles.used() for branch in config.model.all_branches().values()))
    assert named == set(groups)
    assert all(group.features == list(rows) for group in groups.values() if not group.given)
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again == config


def test_dare_and_twin_differ_in_their_groups_only() -> None:
    dare, twin = (load_config(CONFIGS / f"{name}.toml") for name in ("dare", "twin_paper_dare"))
    same = {"groups", "model"}
    assert dare.model_dump(exclude=same) == twin.model_dump(exclude=same)
    assert dare.model.model_dump(exclude={"roles"}) == twin.model.model_dump(exclude={"roles"})


def test_a_group_begins_like_one_that_has_numbers_of_its_own() -> None:
    """Numbers follow from the name that `init_like` says, so a chain of groups would not begin alike."""
    chain = ["groups.query.init_like=target", "groups.target.init_like=value", "groups.value.init_like="]
    with pytest.raises(ConfigError, match=r"init_like = '(query|target)', which itself begins like"):
        load_config(CONFIGS / "twin_4e.toml", chain)
    assert load_config(CONFIGS / "twin_4e.toml").groups["key"].init_like == "query"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.histroy_length=5", "unknown key 'data.histroy_length'; did you mean 'data.history_length'?"),
        (
            "groups.attention.dims=5",
            "unknown key 'groups.attention.dims'; did you mean 'groups.attention.dim'?",
        ),
        ("model.roles.attention=x", "unknown key 'model.roles.attention'"),
        ("trian.epochs=1", "unknown key 'trian'; did you mean 'train'?"),
        ("model.k=0", "model.k: .*greater than or equal to 1.*given: 0"),
        ("groups.attention.dim=15", "groups.attention.dim.*multiple of 4"),
        ("model.weights=cosine", "model.weights: .*'softmax' or 'sigmoid'"),
        (
            "model.roles.attention_target=other",
            "names group 'other'; defined groups: attention, representation",
        ),
        ("groups.attention.init_like=other", "init_like = 'other' is no other group: representation"),
        ("groups.spare.dim=4", "group 'spare' serves no role"),
        ("data.history_length", "write it as section.key=value"),
        ("data.log.x=1", "'log' is a value, not a section"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIGS / "dare.toml", [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["batch_candidates=371"],
            "--set batch_candidates=371: unknown key 'batch_candidates'; "
            "did you mean 'data.batch_candidates'?",
        ),
        (["train.k=5"], "--set train.k=5: unknown key 'train.k'; did you mean 'model.k'?"),
        (["data=3"], "--set data=3: data: must be a section, a table of keys (given: 3)"),
        (
            ["groups.spare.dim=4"],
            "--set groups.spare.dim=4: group 'spare' serves no role; remove it or name it in model.roles",
        ),
    ],
)
def test_a_mistake_of_an_override_names_the_override(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "dare.toml", overrides)
    assert str(caught.value) == message


def test_a_mistake_of_the_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[data]\nfoo = 1\nbar_ = 2\n[train]\nepochs = "many"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["model.k=0"])
    message = str(caught.value)
    assert message.startswith(f"{path}: unknown key 'data.") and message.count("known here: ") == 1
    assert "train.epochs: must be a whole number (given: 'many')" in message
    assert message.endswith("; --set model.k=0: model.k: must be greater than or equal to 1 (given: 0)")


def test_a_mistake_in_a_file_that_another_one_extends_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    low = tmp_path / "base" / "low.toml"
    low.write_text("[model]\nk = 0\n[train]\nepochs = 0\n[data]\nrecent = -1\n")
    path = tmp_path / "top.toml"
    path.write_text('extends = "base/low.toml"\n[train]\nepochs = -1\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["data.recent=-2"])
    at_least = "must be greater than or equal to"
    assert str(caught.value) == (
        f"--set data.recent=-2: data.recent: {at_least} 0 (given: -2); "
        f"{low} (which {path} extends): model.k: {at_least} 1 (given: 0); "
        f"{path}: train.epochs: must be greater than 0 (given: -1)"
    )


def test_what_contradicts_an_override_blames_that_override_alone() -> None:
    others = ["model.k=7", "data.recent=3", "train.seed=1"]
    for needed in ("tasks.click.tower=[3]", "model.level=true", "model.clusters=true", "groups.x.dim=4"):
        with pytest.raises(ConfigError) as caught:
            load_config(CONFIGS / "dare.toml", [*others[:2], needed, others[2]])
        assert str(caught.value).startswith(f"--set {needed}: ")
    # Both are needed for it.
    both = ['groups.representation.sets={far = {owner = "domain:3"}}', "data.domain="]
    with pytest.raises(ConfigError, match=r"^--set groups\.\S+ = \{owner = \"domain:3\"\}\}: groups"):
        load_config(CONFIGS / "dare.toml", [*others, *both])
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "crocodile.toml", [*others, *both])
    assert str(caught.value).startswith(f"--set {both[0]} --set {both[1]}: groups.representation.sets.far")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks=click", "tasks: has a section for each name: write [tasks.click] (given: 'click')"),
        ('tasks=["click", "buy"]', "tasks: has a section for each name: write [tasks.click]"),
        ("tasks=[{}]", "tasks: has a section for each name: write [tasks.NAME]"),
        ("tasks.My-Task.weight=1", f"tasks.My-Task: {NAME}"),
        ("groups.Rep.dim=8", f"groups.Rep: {NAME}"),
        ("model.branches.Long.k=3", f"model.branches.Long: {NAME}"),
        ('tasks.both.product=["Click", "buy"]', f"tasks.both.product.0: {NAME} (given: 'Click')"),
        (f"{SETS}.All.dim=8", f"{SETS}.All: {NAME}"),
        (f"{SETS}=four", f"{SETS}: {FORMS} (given: 'four')"),
        (f"{SETS}=1.5", f"{SETS}: {FORMS} (given: 1.5)"),
        (f"{SETS}=true", f"{SETS}: {FORMS} (given: True)"),
        (f'{SETS}=["a", "b"]', f"{SETS}: {FORMS}"),
        (f"{SETS}=65", f"{SETS}: must be less than or equal to 64 (given: 65)"),
        (f"{SETS}.a=3", f"{SETS}.a: must be a section, a table of keys (given: 3)"),
        (f"{SETS}.a.dim=5", f"{SETS}.a.dim: must be a multiple of 4 (given: 5)"),
        (f"{SETS}.a.ownr=x", f"unknown key '{SETS}.a.ownr'; did you mean '{SETS}.a.owner'?"),
        (
            f"{SETS}.a.owner=me",
            f"{SETS}.a.owner: {OWNER} (given: 'me')",
        ),
        (f"{DIM}.item_id=3", f"{DIM}.item_id: must be a multiple of 4 (given: 3)"),
    ],
)
def test_a_value_of_several_forms_or_names_is_refused_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "base/common.toml", ["model.k=7", override, "train.seed=1"])
    assert str(caught.value) == f"--set {override}: {message}"


def test_errors_about_the_log_name_where_their_key_stands(tmp_path: Path) -> None:
    (tmp_path / "low.toml").write_text("[tables.itm]\nrows = 5\n")
    path = tmp_path / "top.toml"
    text = '[groups.attention]\nfeatures = ["x"]\n[groups.representation]\n'
    path.write_text(f'extends = "low.toml"\n{text}')
    cases = {
        (): f"{tmp_path / 'low.toml'} (which {path} extends): tables.itm: the log has no such feature",
        ("tables.item.rows=3",): "tables.itm",
        ("tables={}",): f"{path}: groups.attention.features: the log has no feature 'x'",
        ("tables={}", 'groups.attention.features=["y"]'): '--set groups.attention.features=["y"]: groups.att',
    }
    for overrides, message in cases.items():
        with pytest.raises(ConfigError) as caught, of_files(path, overrides):
            build_groups(load_config(path, overrides), ROWS)
        assert message in str(caught.value)
        assert str(caught.value).count(str(path)) <= 1
    # What begins with no key of a config stays.
    with pytest.raises(ConfigError, match=r"^plan\.json: bad$"), of_files(path):
        raise ConfigError("plan.json: bad")


def test_the_config_of_another_verb_is_one_sentence() -> None:
    for path, load, found, wanted in (
        ("dare", load_ingest_config, "train", "ingest"),
        ("ingest_time_split", load_config, "ingest", "train"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(CONFIGS / f"{path}.toml")
        assert f"{path}.toml: this is a config of `{found}`; `{wanted}` wants one with" in str(caught.value)
        assert len(str(caught.value)) < 250


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("data = [")
    with pytest.raises(ConfigError, match=r"bad\.toml: not readable as TOML"):
        load_config(tmp_path / "bad.toml")
    for text, words in (
        (
            "groups.*.dim = 4",
            "a key with such a character, or a star, must be in quotes (at line 1, column 8)",
        ),
        ("a = 1\na = 2\n", "this key is given twice (at line 2, column 6)"),
        ("[train]\n[train]\n", "this section is given twice, or is a value elsewhere (at line 2, column 7)"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / "bad.toml")
        assert str(caught.value) == f"{tmp_path}/bad.toml: not readable as TOML: {words}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": {"itm": {"rows": 5}}}, "tables.itm: the log has no such feature; it has item_id"),
        ({"tables": {"item_id": {"rows": 99}}}, "tables.item_id.rows = 99, but the log holds ids up to 99"),
        ({"groups": {"attention": {"features": ["x"]}, "representation": {}}}, "the log has no feature 'x'"),
        (
            {"groups": {"attention": {"dim": {"item_id": 4}}, "representation": {}}},
            "no width for .* 'category_id'",
        ),
    ],
)
def test_mistakes_against_the_log_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_groups(Config.model_validate(change), ROWS)


def test_target_and_behavior_of_one_role_need_equal_widths() -> None:
    tree = {
        "groups": {"a": {"dim": 4}, "b": {"dim": 8}},
        "model": {"roles": {**dict.fromkeys(ROLES, "b"), "attention_target": "a"}},
    }
    with pytest.raises(ConfigError, match=r"attention_target \(a\) and attention_behavior \(b\)"):
        build_groups(Config.model_validate(tree), ROWS)


def test_rows_and_widths_follow_log_and_config() -> None:
    tree = {
        "groups": {"attention": {"dim": {"item_id": 8, "category_id": 4}}, "representation": {"dim": 16}},
        "tables": {"item_id": {"rows": 1000}},
    }
    groups = build_groups(Config.model_validate(tree), ROWS)
    assert groups["attention"].widths() == (8, 4) and groups["attention"].width == 12
    assert [table.rows for table in groups["representation"].tables] == [1000, 10]


def test_first_weights_follow_what_a_group_is_for_unless_they_are_given() -> None:
    def first(name: str, *overrides: str) -> dict[str, tuple[str | None, float | None]]:
        groups = load_config(CONFIGS / f"{name}.toml", overrides).groups
        return {group: (settings.init, settings.init_scale) for group, settings in groups.items()}

    assert first("dare") == {"attention": ("normal", 0.25), "representation": ("uniform", 0.05)}
    assert first("twin") == {"shared": ("normal", 0.25)}
    assert first("dsi_tin") == {"timely": ("uniform", 0.05), "content": ("normal", 0.25)}
    assert first("twin", "groups.shared.init_scale=0.5") == {"shared": ("uniform", 0.5)}
    assert first("twin", "groups.shared.init=normal", "groups.shared.init_scale=1.0") == {
        "shared": ("normal", 1)
    }
    assert first("twin", "groups.shared.init=uniform") == {"shared": ("uniform", 0.05)}
