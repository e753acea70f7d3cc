"""What the league runs: benchmarks/league/league.toml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, PositiveInt

from embeddings.errors import ConfigError
from trainer.config.toml import Settings, load_settings

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
LIST, RATES = HERE / "league.toml", HERE / "rates"
HISTORY_FREE = HERE / "history_free.toml"


class Tree(Settings):
    """The tree on counts: settings that are tried, and trees of each at most."""

    trials: PositiveInt = 6
    iterations: PositiveInt = 300


class Clustered(Settings):
    """A copy of a log with clusters.

    Attributes:
        presets: that run on it. of: the preset whose first run gives the vectors (`from` in the file).
        make: verbs that make it.
    """

    presets: tuple[str, ...]
    of: str = Field(alias="from")
    make: tuple[str, ...]


class Log(Settings):
    """A log of the league.

    Attributes:
        title: of its section. groups: of presets that run on it.
        source: a table of `benchmarks.league.logs.SOURCES` that is fetched first; empty: none.
        make: verbs that make it; smoke: words that the last one has with `--smoke`.
        overrides: of every run on it. adapted: preset -> overrides with which it runs here, such as the
            levels of this log's taxonomy.
    """

    title: str
    groups: tuple[str, ...]
    source: str = ""
    make: tuple[str, ...]
    smoke: str = ""
    overrides: tuple[str, ...] = ()
    adapted: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    clustered: Clustered | None = None


class Smoke(Settings):
    """What `--smoke` runs in place of everything."""

    logs: tuple[str, ...]
    presets: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: PositiveInt
    trials: PositiveInt
    iterations: PositiveInt


class League(Settings):
    """The whole list.

    Attributes:
        seeds: of every preset. pairs: (claimed to be better, than). logs: by name.
        groups: name -> presets, by their names in configs/ or as files of this checkout.
    """

    seeds: tuple[int, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    groups: dict[str, tuple[str, ...]]
    tree: Tree = Tree()
    logs: dict[str, Log]
    smoke: Smoke


@dataclass(frozen=True)
class Entry:
    """A preset on a log.

    Attributes:
        name: of the preset. config: the file that is run: the preset's own, or the one that `tandemrec tune`
            has written for this log; tuned: whether it is the latter.
        overrides: with which it runs on the log, see `Log.adapted`.
    """

    name: str
    config: Path
    tuned: bool = False
    overrides: tuple[str, ...] = ()


def read_league(path: Path = LIST) -> League:
    """The list.

    Raises:
        ConfigError: it is no such list, or a log names a group that is not there.
    """
    league = load_settings(League, path)
    for name, log in league.logs.items():
        missing = [group for group in log.groups if group not in league.groups]
        if missing:
            raise ConfigError(f"{path}: logs.{name}.groups: there is no group {missing[0]!r}")
    return league


def entries_of(league: League, log: str, only: Sequence[str] = (), rates: Path = RATES) -> list[Entry]:
    """The presets of a log, each once, and the model without a history, which is there always.

    Args:
        only: names of those that are wanted; none = all. rates: folder of tuned configs, LOG/PRESET.toml.
    """
    files = [config_of(name) for group in league.logs[log].groups for name in league.groups[group]]
    chosen = {path.stem: path for path in files if not only or path.stem in only}
    chosen[HISTORY_FREE.stem] = HISTORY_FREE
    return [entry_of(league, log, path, rates) for path in chosen.values()]


def config_of(name: str) -> Path:
    """The file of a preset, by its name in configs/ or by its path from the checkout."""
    return ROOT / (name if name.endswith(".toml") else f"configs/{name}.toml")


def entry_of(league: League, log: str, config: Path, rates: Path = RATES) -> Entry:
    """A preset on a log, by the config that was tuned for this log where there is one."""
    tuned, adapted = rates / log / config.name, league.logs[log].adapted.get(config.stem, ())
    return Entry(config.stem, tuned if tuned.exists() else config, tuned.exists(), adapted)


def names_of(league: League) -> Mapping[str, Path]:
    """Every preset that the list names -> its file."""
    every = [*(name for group in league.groups.values() for name in group)]
    every += [name for log in league.logs.values() if log.clustered for name in log.clustered.presets]
    return {path.stem: path for path in map(config_of, every)}
