"""The parameters of a study: which keys of the configuration they set, and what is drawn for them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from embeddings.errors import ConfigError
from pipelines.tune.literals import literal
from pipelines.tune.settings import ParameterConfig

_SCALARS = (bool, int, float, str)
EVERY = "*"
# So close to an end of its range, as a share of it, a best value says that the range may be too narrow.
_CLOSE = 0.05


@dataclass(frozen=True)
class Parameter:
    """One parameter of a space, held against a configuration.

    Attributes:
        name: as the space names it; keys: of the configuration, without stars.
        distribution: what Optuna draws from; choices: the values that stand behind what it draws of a list.
    """

    name: str
    keys: tuple[str, ...]
    distribution: BaseDistribution
    choices: tuple[Any, ...] = ()

    def value_of(self, drawn: Any) -> Any:
        """The value of the keys for what Optuna has drawn."""
        return self.choices[_names(self.choices).index(drawn)] if self.choices else drawn

    def overrides(self, drawn: Any) -> list[str]:
        """`key=value` for each key."""
        return [f"{key}={literal(self.value_of(drawn))}" for key in self.keys]

    def default(self, tree: Mapping[str, Any]) -> tuple[Any, str]:
        """-> (what would be drawn for the configuration as it is, ""), or (None, why nothing would)."""
        values = [next(iter(_values_at(tree, key.split("."))), None) for key in self.keys]
        if any(value is None for value in values):
            return None, f"{self.keys[values.index(None)]} is not set"
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{key} = {value}" for key, value in zip(self.keys, values, strict=True))
            return None, f"its keys differ: {shown}"
        drawn = self._drawn(values[0])
        return drawn, "" if drawn is not None else f"{self.keys[0]} = {values[0]} is not in {self.range}"

    def present(self, tree: Mapping[str, Any]) -> list[str]:
        """`key=value` for each key with what the configuration has; where that is nothing, with an end."""
        found = []
        for key in self.keys:
            value = next(iter(_values_at(tree, key.split("."))), None)
            found.append(f"{key}={literal(self.value_of(self.corners[0]) if value is None else value)}")
        return found

    def _drawn(self, value: Any) -> Any:
        if self.choices:
            plain = [json.loads(json.dumps(choice)) for choice in self.choices]
            return _names(self.choices)[plain.index(value)] if value in plain else None
        among = isinstance(value, int | float) and not isinstance(value, bool)
        return value if among and _contains(self.distribution, value) else None

    @property
    def range(self) -> str:
        """What it may be, for messages."""
        if self.choices:
            return ", ".join(map(literal, self.choices))
        distribution = self.distribution
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return f"{distribution.low:g} to {distribution.high:g}"

    @property
    def definition(self) -> str:
        """All that decides what is drawn, and for which keys, in the words of a space."""
        keys = f"keys = {literal(self.keys)}"
        if self.choices:
            return f"{{ choices = {literal(self.choices)}, {keys} }}"
        distribution = self.distribution
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        log = ", log = true" if distribution.log else ""
        step = f", step = {distribution.step}" if distribution.step and not distribution.log else ""
        return f"{{ low = {distribution.low}, high = {distribution.high}{log}{step}, {keys} }}"

    @property
    def ranged(self) -> bool:
        """Whether it is a range, and not a list of choices."""
        return not self.choices

    @property
    def log(self) -> bool:
        return isinstance(self.distribution, FloatDistribution | IntDistribution) and self.distribution.log

    def end_at(self, drawn: Any) -> str:
        """`lower` or `upper`, where a value lies within a twentieth of its range from that end; else ""."""
        distribution = self.distribution
        if not isinstance(distribution, FloatDistribution | IntDistribution):
            return ""
        low, high, value = (
            math.log(each) if self.log else float(each)
            for each in (distribution.low, distribution.high, drawn)
        )
        share = (value - low) / (high - low)
        return "lower" if share < _CLOSE else "upper" if share > 1 - _CLOSE else ""

    @property
    def corners(self) -> list[Any]:
        """The values at the ends of its range, or all choices, as they are drawn."""
        if self.choices:
            return list(_names(self.choices))
        distribution = self.distribution
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        return [distribution.low, distribution.high]

    @property
    def grid(self) -> list[Any]:
        """All that may be drawn.

        Raises:
            ConfigError: these are too many to count.
        """
        if self.choices:
            return list(_names(self.choices))
        distribution = self.distribution
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        if distribution.step is None or distribution.log:
            raise ConfigError(
                f"parameters.{self.name}: a grid needs choices, whole numbers without log, or a step"
            )
        count = math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
        return [distribution.low + place * distribution.step for place in range(count)]


def overlap(key: str, other: str) -> bool:
    """Whether two keys are one, or one of them is inside of the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def resolve(name: str, given: ParameterConfig, tree: Mapping[str, Any]) -> Parameter:
    """A parameter of the space, held against all settings of the configuration.

    Raises:
        ConfigError: nothing is where a star stands.
    """
    keys = tuple(key for pattern in given.keys or (name,) for key in _expanded(pattern, name, tree))
    if given.choices is not None:
        return Parameter(name, keys, CategoricalDistribution(_names(given.choices)), given.choices)
    assert given.low is not None and given.high is not None
    value = next(iter(_values_at(tree, keys[0].split("."))), None)
    numbers = (given.low, given.high, given.step)
    whole = not isinstance(value, float) and not any(isinstance(each, float) for each in numbers)
    if whole:
        step = int(given.step or 1)
        return Parameter(name, keys, IntDistribution(int(given.low), int(given.high), given.log, step))
    real = FloatDistribution(float(given.low), float(given.high), given.log, given.step)
    return Parameter(name, keys, real)


def _names(choices: Sequence[Any]) -> list[Any]:
    """The choices as Optuna keeps them: what it has no form of as JSON, and all of them if two look equal."""
    names = [each if isinstance(each, _SCALARS) else json.dumps(each) for each in choices]
    return names if len(set(names)) == len(names) else [json.dumps(each) for each in choices]


def _contains(distribution: BaseDistribution, value: float) -> bool:
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if not distribution.low <= value <= distribution.high:
        return False
    steps = (value - distribution.low) / distribution.step if distribution.step else 0.0
    return math.isclose(steps, round(steps), abs_tol=1e-9)


def _expanded(pattern: str, name: str, tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys that a pattern stands for; a key without a star need not be set by the configuration."""
    *sections, last = pattern.split(".")
    if EVERY not in (*sections, last):
        yield pattern
        return
    found: list[tuple[str, Any]] = [("", tree)]
    for section in sections:
        found = [
            (f"{path}{key}.", value)
            for path, within in found
            for key, value in _children(within).items()
            if section in (EVERY, key)
        ]
    keys = [
        f"{path}{key}"
        for path, within in found
        for key in (_children(within) if last == EVERY else (last,))
        if isinstance(within, Mapping | list)
    ]
    if not keys:
        raise ConfigError(f"parameters.{name}: the configuration has nothing that {pattern} stands for")
    yield from keys


def _children(within: Any) -> Mapping[str, Any]:
    if isinstance(within, list):
        return {str(place): each for place, each in enumerate(within)}
    return within if isinstance(within, Mapping) else {}


def _values_at(tree: Any, parts: Sequence[str]) -> list[Any]:
    """The value at a place; empty where there is none."""
    for part in parts:
        children = _children(tree)
        if part not in children:
            return []
        tree = children[part]
    return [tree]
