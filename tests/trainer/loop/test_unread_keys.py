"""Keys of the head `experts` that were given and that nothing reads are said at the start."""

from __future__ import annotations

import json

import pytest

from tests.helpers.launching import ROOT
from tests.helpers.presets import PRESETS
from trainer.model.heads.expert_settings import ExpertsConfig
from trainer.model.heads.nets.table import EXPERTS
from trainer.model.settings import ModelConfig
from trainer.run_config import Config, load_config


def said(config: Config, *owners: str) -> list[str]:
    return config.model.head_kind.unread_keys(config.model, owners or ("shared",))


def experts(*words: str) -> Config:
    return load_config(ROOT / "configs/base/experts.toml", words)


@pytest.mark.parametrize(
    ("words", "key", "why"),
    [
        (["experts.crosses=3"], "experts.crosses = 3", 'model.experts.net is "mlp"'),
        (["experts.field=8", "experts.net=cross"], "experts.field = 8", 'model.experts.net is "cross"'),
        (["experts.maps=[4]", "experts.net=fm"], "experts.maps = [4]", 'model.experts.net is "fm"'),
        (["experts.hidden=[]", "experts.activation=none"], 'experts.activation = "none"', "hidden is empty"),
        (["experts.foreign=open"], 'experts.foreign = "open"', "model.experts.own is 0"),
        (["experts.covariance_rows=0"], "experts.covariance_rows = 0", "model.experts.covariance is 0"),
        (["mixer.hidden=[]"], "mixer.hidden = []", 'model.mixer.kind is "mean"'),
        (["mixer.gate=sets", "mixer.kind=sum"], 'mixer.gate = "sets"', 'model.mixer.kind is "sum"'),
        (["towers.gate_hidden=9"], "towers.gate_hidden = 9", "model.towers has no gates"),
    ],
)
def test_what_nothing_reads_is_said_with_the_reason(words: list[str], key: str, why: str) -> None:
    (line,) = said(experts(*(f"model.{word}" for word in words)))
    assert line.startswith(f"model.{key} (") and why in line


def test_shared_experts_of_no_set_are_said() -> None:
    config = experts("model.experts.shared=2", "model.experts.own=1")
    assert said(config, "task:click", "domain:0") == [] and said(config, "shared") == []
    assert said(config, "task:click") == ["model.experts.shared = 2 (tasks own all sets)"]


@pytest.mark.parametrize("net", EXPERTS)
def test_what_a_net_reads_makes_a_difference_to_it(net: str) -> None:
    """Each key that a net claims changes its parameters or what it gives; others change nothing."""

    def shapes(**keys: object) -> list[tuple[str, tuple[int, ...], int]]:
        built = EXPERTS[net].build(ExpertsConfig(net=net, **{"field": 4, **keys}), 2, 24, 24)
        named = [(name, tuple(part.shape), built.outputs) for name, part in built.named_parameters()]
        return [*named, ("", (), built.outputs)]

    plain = shapes()
    for key, value in {"field": 8, "crosses": 1, "maps": (3,)}.items():
        assert (shapes(**{key: value}) != plain) == (key in EXPERTS[net].reads), key


def test_no_preset_gives_what_it_does_not_read() -> None:
    for name in PRESETS:
        assert not said(load_config(ROOT / f"configs/{name}.toml"), "shared", "task:click"), name


def test_the_config_of_a_run_says_what_differs_from_defaults_alone() -> None:
    config = experts("model.towers.gate_hidden=9", "model.mixer.hidden=[]")
    whole = ModelConfig.model_validate(json.loads(config.model.model_dump_json()))
    again = config.model_copy(update={"model": whole})
    assert said(again) == ["model.towers.gate_hidden = 9 (model.towers has no gates)"]
    assert len(said(config)) == 2
