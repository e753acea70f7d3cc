"""Maps from raw ids to rows, in files of a checkpoint, one a rank.

ids-00000.safetensors   of rank 0: of each feature the buckets that the rank looks after
  <n>.<array>           of feature n, see `embeddings.ids.bucket_map.BucketMap.state`
whose header says, as JSON, `version`, `clock` (see `embeddings.ids.stage.IdStage`) and under `maps`, of each
feature in its order, its name, its rules, its buckets and its arrays.

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
                "feature": name,
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
    files = _open(path)
    lines = []
    for name, own in stage.maps.items():
        before = _rules_of(path, files, name, stage.rules[name])
        parts = [file.part(name) for file in files if file.overlaps(name, own.buckets)]
        try:
            own.load(part_for(own.buckets, parts or [files[0].part(name)], own.rules, before))
        except (ValueError, KeyError, OSError) as error:
            raise_of_store(path, error)
            raise CheckpointError(path, f"its map of {name} cannot be read: {error}") from None
        if own.rules.admission_state != before.admission_state:
            words = [" ".join(each.admission_state) for each in (before, own.rules)]
            lines.append(f"ids.{name}: admission was {words[0]} and is {words[1]} now, and begins anew")
    stage.clock[:] = files[0].clock
    return lines


def frozen_ids(path: Path, rules: Mapping[str, IdRules]) -> dict[str, FrozenIds]:
    """The whole maps of a verified checkpoint, of some features; one process.

    Args:
        rules: feature -> its rules; they may be others than the checkpoint's, as long as the rows stay.

    Raises:
        CheckpointError: as in `read_stage`.
    """
    files, found = _open(path) if rules else [], {}
    for name, each in rules.items():
        _rules_of(path, files, name, each)
        try:
            found[name] = frozen([file.part(name) for file in files], each)
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


def _rules_of(path: Path, files: list[_File], feature: str, now: IdRules) -> IdRules:
    """The rules by which the map of a checkpoint was made.

    Raises:
        CheckpointError: it has no such map, or its rows are not those of `now`.
    """
    if not files or feature not in files[0].maps:
        problem = f"has no map of the ids of {feature}, which ids.{feature} asks for; it was trained without"
        raise CheckpointError(path, f"{problem}: leave ids.{feature} out, or train a new run")
    before = IdRules(**files[0].maps[feature][1]["rules"])
    for key in _FIXED:
        if (was := getattr(before, key)) != (wanted := getattr(now, key)):
            problem = f"was trained with ids.{feature}.{key} = {was}, now it is {wanted}"
            raise CheckpointError(path, f"{problem}; set it back, or train a new run")
    return before


def _open(path: Path) -> list[_File]:
    """The headers of all files of a verified checkpoint, those of rank 0 first."""
    found = []
    for file in sorted(file for file in path.iterdir() if is_id_file(file.name)):
        try:
            length = int.from_bytes(read_range(file, 0, 8), "little")
            header: dict[str, Any] = json.loads(read_range(file, 8, 8 + length))
            notes = header.pop("__metadata__")
            if notes["format"] != "tandemrec.ids" or int(notes["version"]) > _VERSION:
                raise ValueError(f"it is {notes['format']} of version {notes['version']}")
            maps = {each["feature"]: (number, each) for number, each in enumerate(json.loads(notes["maps"]))}
            found.append(_File(file, 8 + length, header, maps, json.loads(notes["clock"])))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise_of_store(file, error)
            raise CheckpointError(file, f"its header cannot be read: {error}") from None
    return found


def is_id_file(name: str) -> bool:
    """Whether a file of a checkpoint has this name because it holds maps of ids."""
    return name.startswith("ids-") and name.endswith(".safetensors")
