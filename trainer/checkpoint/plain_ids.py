"""The maps of ids that come and go, beside plain tables (`trainer.checkpoint.unsharded`).

    DIR/ids/<map>.safetensors  int64 [n] each: `ids`, ascending; `rows`, of each; `last`, when it was seen
                               last, seconds; `uses`, how often it was seen, as the rule of eviction counts

A map has the name of its feature. One that holds a part of a feature's ids, because a group has a capacity of
its own, is called `<feature>@<group>`. What admission remembers of ids without a row is not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file, save

from embeddings.errors import CheckpointError
from embeddings.ids.bucket_map import BucketMap, Int64s
from embeddings.ids.parts import MapPart, part_for
from embeddings.ids.rules import IdRules
from embeddings.ids.stage import IdStage
from trainer.checkpoint.id_files import SavedMaps
from trainer.config.toml import Settings

_COLUMNS = ("ids", "rows", "last", "uses")


class PlainIds(Settings):
    """A map of ids that come and go.

    `live` is the number of ids that have a row; `within` names the feature of whose ids it holds a part;
    `clock` is the time of the newest request, seconds, and the number of steps.
    """

    capacity: int = Field(ge=1)
    shared_rows: int = Field(ge=1)
    within: str = ""
    live: int = Field(ge=0)
    clock: tuple[int, int]


def write_ids(checkpoint: Path, out: Path) -> dict[str, PlainIds]:
    """Write the maps of a verified checkpoint into the folder of plain tables; -> what its manifest says."""
    saved, found = SavedMaps.open(checkpoint), {}
    for name, rules in saved.rules().items():
        columns = living_columns(saved, name)
        (out / "ids").mkdir(exist_ok=True)
        # Not save_file, whose files nobody else may read.
        content = save(columns)
        (out / "ids" / f"{name}.safetensors").write_bytes(content)
        found[name] = PlainIds(
            capacity=rules.capacity,
            shared_rows=rules.shared_rows,
            within=rules.within,
            live=columns["ids"].size,
            clock=saved.clock,
        )
    return found


def living_columns(saved: SavedMaps, name: str) -> dict[str, Int64s]:
    """`ids`, ascending, and of each `rows`, `last` and `uses`, see above; of one map of a checkpoint."""
    rules, columns = saved.rules()[name], list[tuple[Int64s, ...]]()
    for part in saved.parts(name):
        ids, rows = BucketMap.entries_of(part.state, part.buckets, rules)
        slots = rows - rules.first_row(part.buckets)
        columns.append((ids, rows, part.state["last"][slots], part.state["uses"][slots]))
    joined = [np.concatenate(pieces) for pieces in zip(*columns, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return {key: np.ascontiguousarray(values[order]) for key, values in zip(_COLUMNS, joined, strict=True)}


def check_ids(where: Path, known: Mapping[str, PlainIds], rules: Mapping[str, IdRules]) -> None:
    """Raise CheckpointError where the ids of a new run cannot have the rows that they have in plain tables.

    Args:
        where: these are, for the message; known: their maps; rules: of the new run's.
    """
    for name in {**known, **rules}:
        if name not in rules:
            problem = f"its ids of {name} come and go, and here they do not"
            raise CheckpointError(where, f"{problem}: set ids.{name.partition('@')[0]} as it was there")
        if name not in known:
            problem = f"its ids of {name} stay what they are, and ids.{name.partition('@')[0]} is set here"
            raise CheckpointError(where, f"{problem}; leave that out, or train without train.init_from")
        for key in ("capacity", "shared_rows"):
            if (was := getattr(known[name], key)) != (now := getattr(rules[name], key)):
                problem = f"its map of {name} has {key} = {was}, here it is {now}"
                raise CheckpointError(where, f"{problem}; make them equal, so that rows stay")


def take_ids(folder: Path, known: Mapping[str, PlainIds], stage: IdStage) -> list[str]:
    """Have this rank's maps be those of plain tables that `check_ids` has accepted; -> lines that say so."""
    lines = []
    for name, own in stage.maps.items():
        columns = load_file(folder / "ids" / f"{name}.safetensors")
        whole = MapPart(range(own.rules.buckets), BucketMap.state_of_entries(rules=own.rules, **columns))
        own.load(part_for(own.buckets, [whole], own.rules, own.rules))
        stage.clock[:] = known[name].clock
        lines.append(f"ids.{name}: {columns['ids'].size:,} ids keep their rows; admission begins anew")
    return lines
