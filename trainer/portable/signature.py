"""What a portable model is given and what it gives: names, types, axes, meanings, padding and limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from trainer.config.toml import Settings
from trainer.log.schema import ANY_ID
from trainer.portable.scorer import CLUSTERED, RETRIEVED, Columns
from trainer.snapshot import Snapshot
from trainer.snapshot.manifest import InputFeature

Kind = Literal["int64", "float32", "bool"]
KINDS: dict[torch.dtype, Kind] = {torch.int64: "int64", torch.float32: "float32", torch.bool: "bool"}
REQUESTS, BEHAVIORS, CANDIDATES, KEPT = "requests", "behaviors", "candidates", "retrieved"


class Axis(Settings):
    """One axis of a tensor.

    Attributes:
        name: of a size that is free, the same wherever the name is; or of a fixed one.
        least, most: sizes that it may have; most is None where nothing limits it but memory.
    """

    name: str
    least: int = 1
    most: int | None = None

    @property
    def fixed(self) -> bool:
        return self.least == self.most


class PortTensor(Settings):
    """An input or an output.

    Attributes:
        padding: what stands where there is nothing; empty where there is no padding.
        least, most: values that it may have, both included; None = any.
    """

    name: str
    dtype: Kind
    axes: tuple[Axis, ...]
    meaning: str
    padding: str = ""
    least: int | None = None
    most: int | None = None


class Signature(Settings):
    """Everything that a caller must know.

    Attributes:
        tasks: in the order of the last axis of the scores.
        snapshot: digest of the manifest of the snapshot that the model is of; step: of training.
        search: what the choice of behaviors rests on.
        outside: what the caller computes besides: ids of encoded numbers, rows of living ids, matches.
    """

    inputs: tuple[PortTensor, ...]
    outputs: tuple[PortTensor, ...]
    tasks: tuple[str, ...]
    snapshot: str
    step: int
    outside: tuple[str, ...] = ()
    versions: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.inputs]


def columns_of(snapshot: Snapshot) -> Columns:
    """The inputs of a snapshot's model, by what they are to it."""
    model, manifest = snapshot.model, snapshot.manifest
    given = manifest.table_inputs
    keys = {
        table.key: None for name in [*model.first, *model.late] for table in model.lookups.groups[name].tables
    }
    settings = [branch.settings for branch in model.branches.named().values()]
    keys |= {each: None for branch in settings for each in (branch.ids_feature, branch.time_group) if each}
    features = {}
    for key in keys:
        side = given[feature_of(key)]
        features[key] = (
            f"history_{key}" if side.of_behaviors else "",
            f"candidate_{key}" if side.of_candidates else "",
        )
    context = {
        table.key: (f"context_{table.key}",)
        for name in model.of_requests
        for table in model.lookups.groups[name].tables
    }
    numbers = [f"numeric_{name}" for name in snapshot.numeric_names()] if model.numbers else []
    owners = [owner for branch in model.branches.named().values() for owner in branch.owners.values()]
    of_domains = any(owner.startswith("domain:") for owner in owners)
    reads_domain = of_domains or model.config.head_kind.reads_domain(model.config)
    recorded = snapshot.recorded.batch
    return Columns(
        features,
        context,
        frozenset(key for key in [*features, *context] if given[feature_of(key)].multi),
        numbers,
        "domain" if reads_domain else "",
        recorded.retrieval is not None,
        recorded.clusters is not None,
    )


def feature_of(key: str) -> str:
    """The feature of a key of tables, which is `<feature>@<group>` where a group has rows of its own."""
    return key.split("@", maxsplit=1)[0]


def signature_of(snapshot: Snapshot, columns: Columns) -> Signature:
    """The signature of a snapshot's model with these inputs."""
    manifest = snapshot.manifest
    requests, candidates = Axis(name=REQUESTS), Axis(name=CANDIDATES)
    tasks = Axis(name="tasks", least=len(manifest.tasks), most=len(manifest.tasks))
    scores = PortTensor(
        name="probability",
        dtype="float32",
        axes=(requests, candidates, tasks),
        meaning=f"probability of each task, in this order: {', '.join(manifest.tasks)}",
        padding="0 for candidates that are padding",
    )
    return Signature(
        inputs=tuple(_inputs(snapshot, columns)),
        outputs=(scores,),
        tasks=manifest.tasks,
        snapshot=snapshot.digest(),
        step=manifest.step,
        outside=tuple(_outside(snapshot)),
        versions=manifest.versions,
    )


def _inputs(snapshot: Snapshot, columns: Columns) -> Iterator[PortTensor]:
    config = snapshot.manifest.config
    requests, candidates = Axis(name=REQUESTS), Axis(name=CANDIDATES)
    behaviors = Axis(name=BEHAVIORS, most=config.data.history_length)
    most = config.data.history_length
    yield PortTensor(
        name="history_length",
        dtype="int64",
        axes=(requests,),
        least=0,
        most=most,
        meaning="behaviors of each request; where a user has more than the limit, give the newest",
    )
    yield PortTensor(
        name="history_timestamp",
        dtype="int64",
        axes=(requests, behaviors),
        padding="anything",
        meaning="when each behavior was, in seconds, oldest first and before the request",
    )
    yield PortTensor(
        name="request_timestamp", dtype="int64", axes=(requests,), meaning="when it is, in seconds"
    )
    yield PortTensor(
        name="candidate_length",
        dtype="int64",
        axes=(requests,),
        least=0,
        meaning="candidates of each request",
    )
    for key, names in columns.features.items():
        for name, axis, who in zip(names, (behaviors, candidates), ("behavior", "candidate"), strict=True):
            if name:
                yield _ids(snapshot, key, name, (requests, axis), who)
    for key, (name,) in columns.context.items():
        yield _ids(snapshot, key, name, (requests,), "request")
    for name in columns.numbers:
        yield PortTensor(
            name=name,
            dtype="float32",
            axes=(requests, candidates),
            padding="anything",
            meaning="a number of each candidate, as the log has it",
        )
    if columns.domain:
        yield PortTensor(
            name=columns.domain,
            dtype="int64",
            axes=(requests, candidates),
            padding="0",
            least=0,
            most=max(snapshot.model.domains, 1) - 1 if snapshot.model.domains else None,
            meaning=f"the id of {config.data.domain} of each candidate or of its request",
        )
    kept = Axis(name=KEPT, most=config.data.search.budget)
    for name, meaning in zip(RETRIEVED if columns.retrieved else (), _RETRIEVED, strict=False):
        yield PortTensor(
            name=name,
            dtype="int64",
            axes=(requests, candidates, kept),
            padding="-1 in the place",
            meaning=meaning,
        )
    for name, meaning in zip(CLUSTERED if columns.clustered else (), _CLUSTERED, strict=False):
        yield PortTensor(
            name=name,
            dtype="int64",
            meaning=meaning,
            axes=(requests,) if name == CLUSTERED[-1] else (requests, behaviors),
        )


_RETRIEVED = (
    "place in its request's history of each behavior that the hard search of data.search kept, deepest match "
    "first, then the newest",
    "the deepest level of the taxonomy that matched, 1 = coarsest",
    "rank of the behavior counted back from the request in the whole history, 1 = newest",
)
_CLUSTERED = (
    "members of the cluster that the behavior stands for, 0 where it stands for none",
    "mean time of the members, seconds",
    "place in the user's history where the cluster's chunk ends",
    "how much of the user's history the request may see",
)


def _ids(snapshot: Snapshot, key: str, name: str, axes: tuple[Axis, ...], who: str) -> PortTensor:
    feature = feature_of(key)
    given: InputFeature = snapshot.manifest.table_inputs[feature]
    rows = snapshot.manifest.features.get(feature)
    living = key in snapshot.manifest.ids
    what = "rows of the tables for ids" if living else "ids"
    meaning = f"{what} of {feature}, of each {who}"
    most = None if rows is None or rows == ANY_ID else rows - 1
    if given.multi:
        bags = Axis(name=f"ids_{key}")
        return PortTensor(
            name=name,
            dtype="int64",
            axes=(*axes, bags),
            meaning=f"{meaning}, any number",
            padding="-1 after the last id of a bag, and in bags that are padding",
            least=-1,
            most=most,
        )
    return PortTensor(
        name=name,
        dtype="int64",
        axes=axes,
        meaning=f"{meaning}; 0 = not known",
        padding="0",
        least=0,
        most=most,
    )


def _outside(snapshot: Snapshot) -> Iterator[str]:
    manifest = snapshot.manifest
    for name, given in manifest.inputs.items():
        if given.encoder is not None:
            parts = ", ".join(given.encoder.parts(name))
            yield (
                f"{name} is a number; {parts} are made of it by its encoder, which inputs.{name}.encoder of "
                "the snapshot's manifest describes (docs/encoders.md)"
            )
    for name in manifest.ids:
        yield (
            f"rows of {name} come from the snapshot's map of ids (docs/snapshots.md, ids that come and go)"
        )
    for name in manifest.vectors:
        yield f"similarities of {name} are computed from the snapshot's vectors/{name}.safetensors"
    if manifest.config.data.search.levels:
        yield "retrieved behaviors and counts of matches are those of data.search (docs/models.md)"
