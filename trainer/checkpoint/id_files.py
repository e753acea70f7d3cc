"""Maps from raw ids to rows, in files of a checkpoint, one a rank.

ids-00000.safetensors   of rank 0: of each map the buckets that the rank looks after
  <n>.<array>           of map n, see `embeddings.ids.bucket_map.BucketMap.state`
whose header says, as JSON, `version`, `clock` (see `embeddings.ids.stage.IdStage`) and under `maps`, of each
map in its order, its name, its rules, its buckets and its arrays. A map has the name of its feature; see
`embeddings.ids.rules.IdRules.within`.

The number of ranks that wrote them does not matter to whoever reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from embeddings.errors import CheckpointError
from embeddings.ids.bucket_map import Int64s
from embeddings.ids.frozen import FrozenIds
from embeddings.ids.parts import MapPart, State, frozen, part_for
from embeddings.ids.rules import IdRules
from embeddings.ids.stage import IdStage
from trainer.checkpoint.files import Entries
from trainer.checkpoint.tensor_stream import TYPE_NAMES, TensorStream
from trainer.sealed_folder import raise_of_store, sync
from trainer.storage import is_remote
from trainer.storage.objects import read_range

_VERSION = 1
_DTYPES = {
    name: torch.empty(0, dtype=dtype).numpy().dtype
    for dtype, name in TYPE_NAMES.items()
    if dtype != torch.bfloat16
}
# Rules that decide which rows there are.
_FIXED = ("capacity", "shared_rows")


@dataclass(frozen=True)
class IdFiles:
    """Copies of the maps that a rank looks after, which nobody changes.

    Attributes:
        rules, buckets, states: of each feature; clock: of the stage.
    """

    rules: Mapping[str, IdRules]
    buckets: Mapping[str, range]
    states: Mapping[str, State]
    clock: Int64s

    @staticmethod
    def of(stage: IdStage) -> IdFiles:
        """The stage as it is."""
        states = {
            name: {key: array.copy() for key, array in each.state().items()}
            for name, each in stage.maps.items()
        }
        buckets = {name: each.buckets for name, each in stage.maps.items()}
        return IdFiles(stage.rules, buckets, states, stage.clock.copy())

    def write(self, folder: Path, rank: int) -> Entries:
        """Write this rank's file, synced; -> its manifest entry. Training may go on beside it."""
        arrays = {
            f"{number}.{key}": array
            for number, state in enumerate(self.states.values())
            for key, array in state.items()
        }
        maps = [
            {
                "name": name,
                "rules": asdict(self.rules[name]),
                "buckets": [self.buckets[name].start, self.buckets[name].stop],
                "arrays": [*state],
            }
            for name, state in self.states.items()
        ]
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in tensors.items()
        }
        notes = {
            "format": "tandemrec.ids",
            "version": str(_VERSION),
            "clock": json.dumps(self.clock.tolist()),
            "maps": json.dumps(maps),
        }
        file = folder / f"ids-{rank:05d}.safetensors"
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        with TensorStream(file, layout, sizes, notes=notes) as stream:
            for name, tensor in tensors.items():
                # A rank may look after no bucket.
                if len(tensor):
                    stream.append(name, tensor)
        sync(file)
        return {file.name: stream.entry}


def read_stage(path: Path, stage: IdStage) -> list[str]:
    """Have this rank's maps be those of a verified checkpoint, whatever number of ranks wrote it.

    Returns:
        Lines that say what begins anew.

    Raises:
        CheckpointError: it has no map of a feature, or one of other rows; or a file cannot be read.
    """
    saved, lines = SavedMaps.open(path), []
    for name, own in stage.maps.items():
        before = saved.checked(name, own.rules)
        try:
            own.load(part_for(own.buckets, saved.parts(name, own.buckets), own.rules, before))
        except (ValueError, KeyError, OSError) as error:
            raise_of_store(path, error)
            raise CheckpointError(path, f"its map of {name} cannot be read: {error}") from None
        if own.rules.admission_state != before.admission_state:
            words = [" ".join(each.admission_state) for each in (before, own.rules)]
            lines.append(f"ids.{name}: admission was {words[0]} and is {words[1]} now, and begins anew")
    stage.clock[:] = saved.clock
    return lines


def frozen_ids(path: Path, rules: Mapping[str, IdRules]) -> dict[str, FrozenIds]:
    """The whole maps of a verified checkpoint, of some features; one process.

    Args:
        rules: feature -> its rules; they may be others than the checkpoint's, as long as the rows stay.

    Raises:
        CheckpointError: as in `read_stage`.
    """
    if not rules:
        return {}
    saved, found = SavedMaps.open(path), {}
    for name, each in rules.items():
        saved.checked(name, each)
        try:
            found[name] = frozen(saved.parts(name), each)
        except (ValueError, KeyError, OSError) as error:
            raise_of_store(path, error)
            raise CheckpointError(path, f"its map of {name} cannot be read: {error}") from None
    return found


@dataclass(frozen=True)
class _File:
    """The header of a file.

    Attributes:
        begin: where the first array begins; stored: entries of the arrays; maps: by feature, see above.
    """

    path: Path
    begin: int
    stored: Mapping[str, Any]
    maps: Mapping[str, tuple[int, Mapping[str, Any]]]
    clock: list[int]

    def buckets(self, feature: str) -> range:
        return range(*self.maps[feature][1]["buckets"])

    def overlaps(self, feature: str, buckets: range) -> bool:
        """Whether the file holds some of these buckets of a feature."""
        own = self.buckets(feature)
        return max(own.start, buckets.start) < min(own.stop, buckets.stop)

    def part(self, feature: str) -> MapPart:
        """The arrays of a feature; those of a file of this machine are memory-mapped."""
        number, entry = self.maps[feature]
        return MapPart(
            self.buckets(feature), {key: self._array(f"{number}.{key}") for key in entry["arrays"]}
        )

    def _array(self, name: str) -> npt.NDArray[Any]:
        entry = self.stored[name]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = (self.begin + place for place in entry["data_offsets"])
        if begin == end:
            return np.zeros(shape, dtype)
        if is_remote(self.path):
            return np.frombuffer(read_range(self.path, begin, end), dtype).reshape(shape)
        return np.memmap(self.path, dtype, "r", begin, shape)


@dataclass(frozen=True)
class SavedMaps:
    """The maps of a verified checkpoint; it may have none.

    Attributes:
        files: of its ranks, those of rank 0 first.
    """

    path: Path
    files: tuple[_File, ...]

    @staticmethod
    def open(path: Path) -> SavedMaps:
        """Read the headers.

        Raises:
            CheckpointError: a header says something else than this version writes.
        """
        found = []
        for file in sorted(file for file in path.iterdir() if is_id_file(file.name)):
            try:
                found.append(_read_header(file))
            except (ValueError, KeyError, TypeError, OSError) as error:
                raise_of_store(file, error)
                raise CheckpointError(file, f"its header cannot be read: {error}") from None
        return SavedMaps(path, tuple(found))

    @property
    def clock(self) -> tuple[int, int]:
        """See `embeddings.ids.stage.IdStage`."""
        now, steps = self.files[0].clock
        return now, steps

    def rules(self) -> dict[str, IdRules]:
        """Name of a map -> the rules by which it was made."""
        maps = self.files[0].maps if self.files else {}
        return {name: IdRules(**entry["rules"]) for name, (_, entry) in maps.items()}

    def parts(self, name: str, buckets: range | None = None) -> list[MapPart]:
        """What the files hold of a map, one at least: all, or those with some of these buckets."""
        wanted = [file for file in self.files if buckets is None or file.overlaps(name, buckets)]
        return [file.part(name) for file in wanted or self.files[:1]]

    def checked(self, name: str, now: IdRules) -> IdRules:
        """The rules by which a map was made.

        Raises:
            CheckpointError: there is no such map, or its rows are not those of `now`.
        """
        before, key = self.rules().get(name), f"ids.{name.partition('@')[0]}"
        if before is None:
            problem = f"has no map of the ids of {name}, which {key} asks for; it was trained without"
            raise CheckpointError(self.path, f"{problem}: leave {key} out, or train a new run")
        for setting in _FIXED:
            if (was := getattr(before, setting)) != (wanted := getattr(now, setting)):
                problem = f"its map of {name} has {setting} = {was}, by {key} it is {wanted} now"
                raise CheckpointError(self.path, f"{problem}; set it back, or train a new run")
        return before


def _read_header(file: Path) -> _File:
    length = int.from_bytes(read_range(file, 0, 8), "little")
    header: dict[str, Any] = json.loads(read_range(file, 8, 8 + length))
    notes = header.pop("__metadata__")
    if notes["format"] != "tandemrec.ids" or int(notes["version"]) > _VERSION:
        raise ValueError(f"it is {notes['format']} of version {notes['version']}")
    maps = {each["name"]: (number, each) for number, each in enumerate(json.loads(notes["maps"]))}
    return _File(file, 8 + length, header, maps, json.loads(notes["clock"]))


def is_id_file(name: str) -> bool:
    """Whether a file of a checkpoint has this name because it holds maps of ids."""
    return name.startswith("ids-") and name.endswith(".safetensors")
