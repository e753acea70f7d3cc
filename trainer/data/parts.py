"""Groups may name a number of the log, or a similarity: their tables are those of its encoder's parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from embeddings.errors import ConfigError
from trainer.config.tables import GroupConfig
from trainer.log.schema import TableFeature


def with_parts(
    groups: Mapping[str, GroupConfig],
    known: Mapping[str, TableFeature],
    named: Mapping[str, Collection[str]],
) -> dict[str, GroupConfig]:
    """The groups with the features that tables have.

    Args:
        known: the features that tables may have; named: section of the config -> the features it has keys of.

    Raises:
        ConfigError: such a section names a number, or a part of it: its encoder says its rows.
    """
    parts: dict[str, list[str]] = {}
    for part, info in known.items():
        if info.field:
            parts.setdefault(info.field, []).append(part)
    for section, names in named.items():
        for name in names:
            if name in parts or (name in known and known[name].field):
                raise ConfigError(f"{section}.{name}: it is a number, whose encoder says its rows")
    found = {}
    for name, group in groups.items():
        features = tuple(part for each in group.features for part in parts.get(each, [each]))
        dim = group.dim
        if isinstance(dim, dict):
            dim = {part: each for key, each in dim.items() for part in parts.get(key, [key])}
        found[name] = group.model_copy(update={"features": features, "dim": dim})
    return found
