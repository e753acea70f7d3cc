"""The sections [data.vectors.<name>] and [data.similarity.<name>]: pre-trained vectors, and what is made of
their similarities."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from trainer.config.mistakes import NAME
from trainer.config.places import PlaceSetting
from trainer.config.toml import Settings

# Names of vectors become names of files in a snapshot, and those of similarities are features.
VectorsName = Annotated[str, StringConstraints(pattern=NAME, max_length=100)]
SimilarityName = Annotated[str, StringConstraints(pattern=NAME, max_length=100)]
USER: str = "user_id"
"""What `key` is called where vectors are of the log's users, who are no feature."""


class VectorsConfig(Settings):
    """Pre-trained vectors in Parquet: one row an id, from any model. See docs/encoders.md."""

    file: PlaceSetting = Path("vectors.parquet")
    """The file, or a folder with `*.parquet` files, here or in an object store."""
    key: str = "item_id"
    """What has the vectors: a feature of the log with one id, or `user_id`, the log's users."""
    id_column: str = ""
    """The column of the ids: raw values of `key` as they were ingested, or the log's ids where it has no
    vocabulary. Empty means that it is called as `key`."""
    vector_column: str = "vector"
    """The column of the vectors: lists of numbers, all of one width."""

    @property
    def ids(self) -> str:
        """The name of the column of ids."""
        return self.id_column or self.key


class SimilarityConfig(Settings):
    """A feature of candidates: how near the vector of a candidate is to other vectors. See docs/encoders.md.

    Its name, or the names that docs/encoders.md tells, may stand in groups.<name>.features.
    """

    of: VectorsName
    """The vectors of the candidates, a name of [data.vectors]."""
    to: VectorsName
    """The vectors that they are compared with. If their `key` is a feature of behaviors, these are the
    vectors of all behaviors that the request may see; if it is a context feature or `user_id`, it is the one
    of the request."""
    statistic: Literal["max", "mean", "top", "histogram"] = "max"
    """What becomes of the cosines with several behaviors: the greatest one, their mean, the mean of the `top`
    greatest, or how many of them are in each of `tiers` (SimTier). For one vector all but `histogram` are the
    same."""
    top: int = Field(10, ge=1, le=1_000_000)
    """How many cosines `statistic = "top"` takes the mean of; of fewer, it is the mean of all."""
    tiers: int = Field(20, ge=2, le=1000)
    """The number of equal parts of [-1, 1] whose cosines `statistic = "histogram"` counts."""
    step: float = Field(0.01, ge=1e-5, le=1)
    """The number is rounded to multiples of it."""
    encoder: Literal["mnse", "buckets"] = "mnse"
    """What the number becomes: `mnse`, its digits in several bases, or `buckets`, one id for each multiple of
    `step`."""
    bases: tuple[Annotated[int, Field(ge=2, le=1 << 16)], ...] = Field((2, 3, 10), min_length=1)
    """The bases of `mnse`."""
    combine: Literal["concat", "sum"] = "concat"
    """Whether each base of `mnse` is a feature with a table of its own, or one table has all digits."""

    @field_validator("bases")
    @classmethod
    def _each_base_once(cls, bases: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(bases)) < len(bases):
            raise ValueError("names one base twice; leave each once")
        return bases


def problems_of_similarity(
    vectors: Mapping[str, VectorsConfig], similarities: Mapping[str, SimilarityConfig]
) -> Iterator[str]:
    """What the two sections say against each other."""
    for name, each in similarities.items():
        for key in ("of", "to"):
            wanted = getattr(each, key)
            if wanted not in vectors:
                known = ", ".join(vectors) or "none"
                yield (
                    f"data.similarity.{name}.{key} = {wanted!r}: there are no such vectors; name a section "
                    f"of [data.vectors], which has {known}"
                )


def without_effect(
    vectors: Mapping[str, VectorsConfig],
    similarities: Mapping[str, SimilarityConfig],
    of_groups: Collection[str] = (),
) -> list[str]:
    """The settings that nothing looks at, with the reason; `of_groups`: vectors that are rows of tables."""
    read = {*of_groups} | {name for each in similarities.values() for name in (each.of, each.to)}
    unused = [
        f"data.vectors.{name} (no similarity and no group names it)" for name in vectors if name not in read
    ]
    for name, each in similarities.items():
        tiers = each.statistic == "histogram"
        keys = [] if each.statistic == "top" else ["top"]
        keys += ["step", "encoder", "bases", "combine"] if tiers else ["tiers"]
        keys += ["bases", "combine"] if each.encoder != "mnse" and not tiers else []
        why = f'encoder is "{each.encoder}"'
        for key in keys:
            if getattr(each, key) != SimilarityConfig.model_fields[key].get_default():
                of_encoder = key in ("bases", "combine") and not tiers
                reason = why if of_encoder else f'statistic is "{each.statistic}"'
                unused.append(f"data.similarity.{name}.{key} ({reason})")
    return unused
