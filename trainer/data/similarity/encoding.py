"""What a similarity becomes: ids of small tables."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from embeddings.errors import ConfigError
from trainer.config.sections import DataConfig
from trainer.config.similarity import SimilarityConfig
from trainer.data.similarity.statistics import Ints
from trainer.log.bags import Bags, offsets_of
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import integer_of
from trainer.log.encoders.encoder import Encoder
from trainer.log.encoders.mnse import Mnse
from trainer.log.schema import LogManifest, TableFeature

# Counts of a tier have levels 1, 2 or 3, 4 to 7 and so on: a history is shorter than 2^LEVELS.
LEVELS: Final = 20


def _mnse(settings: SimilarityConfig) -> Encoder:
    return Mnse(
        kind="mnse",
        bases=settings.bases,
        range=(-1.0, 1.0),
        step=settings.step,
        combine=settings.combine,
    )


def _buckets(settings: SimilarityConfig) -> Encoder:
    first, last = (integer_of(end, settings.step) for end in (-1.0, 1.0))
    edges = tuple(place * settings.step for place in range(first + 1, last + 1))
    return Buckets(kind="buckets", step=settings.step, edges=edges)


_ENCODERS: Final = {"mnse": _mnse, "buckets": _buckets}


def encoder_of(settings: SimilarityConfig) -> Encoder:
    """The encoder of the number that a statistic gives."""
    return _ENCODERS[settings.encoder](settings)


def parts_of(name: str, settings: SimilarityConfig) -> dict[str, int]:
    """Feature that a table may have for a similarity -> rows of the table."""
    if settings.statistic == "histogram":
        return {name: 1 + settings.tiers * LEVELS}
    return encoder_of(settings).parts(name)


def similarity_features(data: DataConfig) -> dict[str, TableFeature]:
    """The features of tables that similarities add to candidates."""
    found = {}
    for name, settings in data.similarity.items():
        tiers = {name: settings.tiers} if settings.statistic == "histogram" else None
        most = tiers or encoder_of(settings).most_ids(name)
        keys = [data.vectors[each].key for each in (settings.of, settings.to)]
        meaning = f"similarity of {keys[0]} to {keys[1]}: {settings.model_dump_json()}"
        for part, rows in parts_of(name, settings).items():
            found[part] = TableFeature(
                rows=rows,
                multi=most[part] > 1,
                side="candidate",
                field=name,
                most_ids=most[part],
                meaning=f"{meaning}, {part.removeprefix(name)}",
            )
    return found


def features_of_tables(data: DataConfig, manifest: LogManifest) -> dict[str, TableFeature]:
    """The features of behaviors and candidates that tables may have: of the log, and similarities.

    Raises:
        ConfigError: a similarity has the name of a feature of the log.
    """
    known = {**manifest.features, **manifest.context, **manifest.table_features, **manifest.table_context}
    for name, parts in parts_by_similarity(data).items():
        if taken := [each for each in (name, *parts) if each in known]:
            problem = f"the log has a feature {taken[0]!r}; give the similarity another name"
            raise ConfigError(f"data.similarity.{name}: {problem}")
    return {**manifest.table_features, **similarity_features(data)}


def parts_of_numbers(data: DataConfig, manifest: LogManifest) -> list[str]:
    """The features of tables that an encoder makes of numbers, those of requests and similarities among them.

    Their tables have as many rows as the encoder says, whatever ids a log holds.
    """
    of_tables = {**features_of_tables(data, manifest), **manifest.table_context}
    return [name for name, info in of_tables.items() if info.field]


def parts_by_similarity(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """Similarity -> its features, which stand for it where a group names it."""
    return {name: tuple(parts_of(name, settings)) for name, settings in data.similarity.items()}


def bags_of_tiers(counts: Ints, given: npt.NDArray[np.bool_]) -> Bags:
    """A bag for each candidate: an id for each tier that is not empty, of the tier and of log2 of its count.

    Args:
        counts: [c, tiers]; given: [c], whether there is anything to count; where not, the bag has id 0.
    """
    tiers = counts.shape[1]
    level = np.frexp(counts.astype(np.float64))[1].clip(max=LEVELS)
    ids = 1 + LEVELS * np.arange(tiers) + level - 1
    used = counts > 0
    lengths = used.sum(axis=1)
    lengths[~given] = 1
    values = np.zeros(int(lengths.sum()), dtype=np.int32)
    of_given = np.repeat(given, lengths)
    values[of_given] = ids[used]
    return Bags(values, offsets_of(lengths))
