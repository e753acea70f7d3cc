"""What a space may say, and what it means for a configuration."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution

from embeddings.errors import ConfigError
from pipelines.tune.literals import dotted, literal
from pipelines.tune.settings import ParameterConfig, read_space
from pipelines.tune.space import resolve
from tests.helpers.launching import ROOT

TREE: dict[str, Any] = {
    "groups": {"a": {"learning_rate": 0.2, "dim": 8}, "b": {"learning_rate": 0.2, "dim": 16}},
    "train": {"learning_rate": 0.003, "max_steps": 0},
    "model": {"hidden": [8], "k": 20, "time": None},
    "phases": [{"learning_rate": 0.1}, {"learning_rate": 0.1}],
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, st.lists(TEXTS, min_size=1, max_size=3))
def test_literals_are_toml(value: Any, parts: list[str]) -> None:
    tree: Any = tomllib.loads(f"{dotted(parts)} = {literal(value)}")
    for part in parts:
        tree = tree[part]
    assert tree == value


@pytest.mark.parametrize(
    ("given", "value", "end"),
    [
        (ParameterConfig(low=0.01, high=1.0, log=True), 0.012, "lower"),
        (ParameterConfig(low=0.01, high=1.0, log=True), 0.9, "upper"),
        (ParameterConfig(low=0.01, high=1.0, log=True), 0.02, ""),
        (ParameterConfig(low=0.01, high=1.0), 0.02, "lower"),
        (ParameterConfig(low=20, high=100, step=20), 100, "upper"),
        (ParameterConfig(low=20, high=100, step=20), 80, ""),
        (ParameterConfig(choices=(0.1, 0.2)), 0.1, ""),
    ],
)
def test_the_end_of_a_range_that_a_value_lies_at(given: ParameterConfig, value: float, end: str) -> None:
    assert resolve("model.k" if value >= 20 else "train.learning_rate", given, TREE).end_at(value) == end


@pytest.mark.parametrize(
    ("name", "keys", "found"),
    [
        ("groups.*.learning_rate", (), ("groups.a.learning_rate", "groups.b.learning_rate")),
        ("phases.*.learning_rate", (), ("phases.0.learning_rate", "phases.1.learning_rate")),
        ("train.new", (), ("train.new",)),
        (
            "tied",
            ("train.learning_rate", "groups.*.dim"),
            ("train.learning_rate", "groups.a.dim", "groups.b.dim"),
        ),
    ],
)
def test_stars_and_tied_keys(name: str, keys: tuple[str, ...], found: tuple[str, ...]) -> None:
    parameter = resolve(name, ParameterConfig(keys=keys, low=0.1, high=1), TREE)
    assert parameter.keys == found
    assert parameter.overrides(0.25) == [f"{key}=0.25" for key in found]


def test_a_star_stands_for_something() -> None:
    with pytest.raises(
        ConfigError, match=r"parameters\.tables\.\*\.rows: .* nothing that tables\.\*\.rows stands"
    ):
        resolve("tables.*.rows", ParameterConfig(low=1, high=2), TREE)


def test_whole_numbers_are_for_whole_keys() -> None:
    assert isinstance(resolve("model.k", ParameterConfig(low=1, high=9), TREE).distribution, IntDistribution)
    real = resolve("train.learning_rate", ParameterConfig(low=1, high=9), TREE).distribution
    assert isinstance(real, FloatDistribution)


@pytest.mark.parametrize(
    ("name", "config", "drawn", "why"),
    [
        ("groups.*.learning_rate", {"low": 0.01, "high": 1.0}, 0.2, ""),
        (
            "groups.*.learning_rate",
            {"low": 0.3, "high": 1.0},
            None,
            "groups.a.learning_rate = 0.2 is not in 0.3 to 1",
        ),
        ("groups.*.dim", {"choices": [8, 16]}, None, "keys differ: groups.a.dim = 8, groups.b.dim = 16"),
        ("model.k", {"low": 10, "high": 30, "step": 10}, 20, ""),
        ("model.k", {"low": 5, "high": 35, "step": 10}, None, "model.k = 20 is not in 5 to 35"),
        ("model.hidden", {"choices": [[8], [16, 8]]}, "[8]", ""),
        ("model.time", {"choices": ["a", "b"]}, None, "model.time is not set"),
    ],
)
def test_the_configuration_as_it_is(name: str, config: dict[str, Any], drawn: Any, why: str) -> None:
    found, reason = resolve(name, ParameterConfig(**config), TREE).default(TREE)
    assert found == drawn
    assert reason.endswith(why)
    assert bool(reason) == (drawn is None)


def test_choices_keep_their_values() -> None:
    lists = resolve("model.hidden", ParameterConfig(choices=([8], [16, 8])), TREE)
    assert [lists.overrides(drawn) for drawn in lists.grid] == [
        ["model.hidden=[8]"],
        ["model.hidden=[16, 8]"],
    ]
    # Optuna's own choices would be equal here.
    mixed = resolve("model.k", ParameterConfig(choices=("1", 1.5)), TREE)
    assert [mixed.value_of(drawn) for drawn in mixed.grid] == ["1", 1.5]


def test_grids() -> None:
    assert resolve("model.k", ParameterConfig(low=1, high=4), TREE).grid == [1, 2, 3, 4]
    steps = resolve("train.learning_rate", ParameterConfig(low=0.1, high=0.3, step=0.1), TREE).grid
    assert steps == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ConfigError, match="a grid needs choices"):
        _ = resolve("train.learning_rate", ParameterConfig(low=0.1, high=0.3), TREE).grid


REFUSED = {
    "": "parameters: is empty: name a key to search, such as train.learning_rate = { low",
    "a.b = 3": "a.b is no parameter: write { low = ..., high = ... } or { choices = [...] }",
    "a.b = { low = 1 }": "needs both low and high, or choices",
    "a.b = { low = 2, high = 1 }": "low = 2 must be less than high = 1",
    "a.b = { low = 0, high = 1, log = true }": "log needs low > 0, and no step",
    "a.b = { choices = [1], keys = ['c'] }": "choices must be two or more",
    "a.b = { choices = [1, 1] }": "one of the choices occurs twice",
    "a.b = { choices = [1, 2], low = 1 }": "has choices, or low and high",
    "a.b = { low = 1, hihg = 2 }": "did you mean",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_parameter(text: str, tmp_path: Path) -> None:
    file = tmp_path / "space.toml"
    file.write_text(f"[parameters]\n{text}\n")
    with pytest.raises(ConfigError, match=r"space\.toml") as error:
        read_space(file)
    assert REFUSED[text] in str(error.value)


def test_what_is_no_space(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: no such file; configs/spaces/ holds ready ones"):
        read_space(tmp_path / "nothing.toml")
    (tmp_path / "config.toml").write_text("[train]\nepochs = 2\n")
    with pytest.raises(ConfigError, match=r"config of `train`; `tune --space` wants one with \[parameters\]"):
        read_space(tmp_path / "config.toml")
    (tmp_path / "bare.toml").write_text("[study]\ntrials = 2\n")
    with pytest.raises(ConfigError, match="parameters: is empty"):
        read_space(tmp_path / "bare.toml")


def test_dots_make_sections_with_and_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[parameters]\ntrain.rate = { low = 1, high = 2 }\n")
    (tmp_path / "b.toml").write_text('[parameters]\n"train.rate" = { low = 1, high = 2 }\n')
    assert read_space(tmp_path / "a.toml") == read_space(tmp_path / "b.toml")
    assert list(read_space(tmp_path / "a.toml").parameters) == ["train.rate"]


def test_the_space_of_the_presets_suits_them() -> None:
    from trainer.run_config import load_config

    given = read_space(ROOT / "configs" / "spaces" / "rates.toml")
    for preset in ("dare", "twin"):
        tree = load_config(ROOT / "configs" / f"{preset}.toml").model_dump(mode="json")
        found = [resolve(name, each, tree).default(tree) for name, each in given.parameters.items()]
        assert found == [(0.2, ""), (0.003, "")]
