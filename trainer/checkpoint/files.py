"""A checkpoint as files: its manifest, what makes one good, which is the newest, and which go.

    step-00001200/__0_0.distcp ...   shards of torch.distributed.checkpoint, and its .metadata
    step-00001200/state.json         what does not depend on ranks: cursor, step, config, plan
    step-00001200/manifest.json      size and SHA-256 of every file above
    step-00001200/manifest.sha256    of manifest.json itself, as `sha256sum -c` reads it

In an object store, where nothing can be renamed, each save writes into a folder of its own,
`step-00001200-<id>`. It counts once its `manifest.sha256` is there, which is written last and deleted first.

Nothing here talks to other ranks; `trainer.checkpoint.save_load` does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from embeddings.errors import CheckpointError
from trainer.log.names import path_problem
from trainer.sealed_folder import (
    DIGEST,
    MANIFEST,
    Seal,
    entry_of,
    file_digest,
    raise_of_store,
    remove_folder,
    sweep,
    sync,
    voice,
)
from trainer.sealed_folder import publish as publish_folder
from trainer.sealed_folder import retire as retire_folder
from trainer.storage import is_remote
from trainer.storage.objects import sizes, unfinished, written_at

# In a store with an id of the save: nothing is renamed there.
_NAME = re.compile(r"step-(\d{8})(?:-[0-9a-f]{8})?$")
# One that was damaged when its step was saved again.
_ASIDE = re.compile(r"step-(\d{8})\.refused-[0-9a-f]{8}")
STATE = "state.json"
SEAL = Seal(CheckpointError, "the checkpoint is of no use", names_file=True)
# File name -> {"bytes": size, "sha256": digest}.
Entries = dict[str, dict[str, Any]]


def final_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The steps that a checkpoint was saved after."""
    match = _NAME.search(path.name)
    assert match is not None
    return int(match[1])


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return _NAME.fullmatch(name) is not None


def manifest_digest(path: Path) -> str:
    """What a delta calls a checkpoint by, besides its name: the SHA-256 of its manifest."""
    return file_digest(path / MANIFEST)


def new_part(folder: Path, step: int) -> Path:
    """A folder that nobody else writes into, for a save to be made in."""
    between = "-" if is_remote(folder) else ".tmp-"
    return folder / f"{final_name(step)}{between}{os.urandom(4).hex()}"


def final_of(part: Path) -> Path:
    """What the folder of a save is called in the end."""
    return part if is_remote(part) else part.with_name(part.name.partition(".tmp-")[0])


def checkpoints(folder: Path) -> list[Path]:
    """All that has the name of a checkpoint, the last step first; in a store, all that are complete."""
    if is_remote(folder):
        paths = [file.rpartition("/") for file in sizes(folder)]
        found = [folder / name for name, _, file in paths if file == DIGEST]
    else:
        found = list(folder.glob("step-*"))
    return sorted((path for path in found if _NAME.search(path.name)), reverse=True)


def bytes_of_all(folder: Path) -> int:
    """What the checkpoints of a local folder take of its disk; those set aside or half written do not count.

    They are given up as new ones come, whole ones and deltas. Of a store, whose room has no bounds, 0.
    """
    total = 0
    for path in [] if is_remote(folder) else checkpoints(folder):
        # A training that runs there may be deleting it.
        with suppress(FileNotFoundError):
            total += sum(sizes(path).values())
    return total


def of_step(folder: Path, step: int) -> list[Path]:
    """The checkpoints of a step: one at most, or in a store several, in the order of their random ids."""
    return [path for path in checkpoints(folder) if step_of(path) == step]


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the file that is missing, extra, short or changed.
    """
    check_files(path, read_manifest(path))


def check_files(path: Path, entries: Entries) -> None:
    """Compare the content of some files with their entries.

    Raises:
        CheckpointError: one differs or cannot be read.
    """
    for name, entry in sorted(entries.items()):
        SEAL.check(path / name, entry["bytes"], entry["sha256"])


def read_manifest(path: Path) -> Entries:
    """The file list of a checkpoint whose files are all there in their size; their content is not read.

    Raises:
        CheckpointError: the manifest is damaged, or a file is missing, extra or of another size.
    """
    manifest = path / MANIFEST
    entries = _object(manifest, SEAL.read(path)).get("files")
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("bytes"), int)
        and isinstance(entry.get("sha256"), str)
        for entry in entries.values()
    ):
        raise CheckpointError(manifest, "holds no file list; delete this checkpoint")
    for name in entries:
        if problem := path_problem(name):
            raise CheckpointError(manifest, f"names a file {name!r}, which {problem}")
    bytes_of = sizes(path)
    for name in sorted((set(bytes_of) - {MANIFEST, DIGEST}) ^ set(entries)):
        raise CheckpointError(path / name, "missing" if name in entries else "not in the manifest")
    for name, entry in sorted(entries.items()):
        if bytes_of[name] != entry["bytes"]:
            raise CheckpointError(path / name, "has another size than in the manifest; it is corrupt")
    return entries


def read_state(path: Path) -> dict[str, Any]:
    """The rank-independent state of a verified checkpoint."""
    file = path / STATE
    try:
        return _object(file, file.read_bytes())
    except OSError as error:
        raise_of_store(file, error)
        raise CheckpointError(file, f"unreadable: {error.strerror}") from None


def prepare(folder: Path, part: Path) -> None:
    """Make the directory to write into; what a killed save or deletion left behind goes.

    In a store there is no telling a killed save from one under way, so there it goes after a day.
    """
    if is_remote(folder):
        for left in unfinished(folder, DIGEST):
            if _NAME.search(left.name) and left.name != part.name:
                remove_folder(left)
        return
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    sweep(folder, "*.tmp-*", owns=True, alone=True)
    part.mkdir()


def write_state(part: Path, state: Mapping[str, Any]) -> Entries:
    """Write `state.json`; -> its manifest entry."""
    file = part / STATE
    file.write_text(json.dumps(state, indent=1), encoding="utf-8")
    sync(file)
    return {STATE: entry_of(file)}


def seal(part: Path, entries: Entries) -> None:
    """Write the manifest over files that have reached the disk.

    Raises:
        CheckpointError: a file that some rank wrote is not here.
    """
    present = sizes(part)
    for name in entries:
        if name not in present:
            problem = "was written by another rank and is not visible here; all ranks must share this folder"
            raise CheckpointError(part / name, problem)
    SEAL.write(part, json.dumps({"files": dict(sorted(entries.items()))}, indent=1))


def publish(part: Path, final: Path, damage: str = "") -> None:
    """Give a sealed checkpoint its name.

    Args:
        damage: what is wrong with the one that has it, which is set aside for whoever wants to look at it.
    """
    if is_remote(part):
        return
    aside = final.with_name(f"{final.name}.refused-{os.urandom(4).hex()}")
    publish_folder(part, final, aside=aside, synced=True)
    if aside.exists():
        goes = "it is deleted once checkpoint.keep newer checkpoints are there"
        voice.say(f"{final}: saved anew; what was there is set aside as {aside.name} ({damage}); {goes}")


def choose(folder: Path, newest: Path, state: Mapping[str, Any], which: str) -> list[Path]:
    """What `which` names (see `trainer.checkpoint.save_load.find_to_use`), one at least, not yet verified.

    Several where a damaged one of a store was saved anew.

    Args:
        newest, state: the newest good one, and what it knows.

    Raises:
        CheckpointError: nothing has that name.
    """
    best = int(state.get("best", {}).get("step", -1))
    if which == "newest" or (not which and best < 0):
        return [newest]
    if which in ("", "best"):
        if best < 0:
            problem = "knows of no best checkpoint: set train.early_stopping.patience, or take the newest"
            raise CheckpointError(newest, problem)
        return of_step(folder, best) or [folder / final_name(best)]
    found = of_step(folder, int(which)) if which.isdecimal() else []
    if not found:
        steps = ", ".join(str(step_of(path)) for path in checkpoints(folder))
        raise CheckpointError(folder, f"no checkpoint {which!r}: give newest, best or a step, of {steps}")
    return found


def retire(
    folder: Path, final: Path, keep: int, best: int = -1, refused: Collection[str] = frozenset()
) -> None:
    """Delete all but the newest `keep` checkpoints up to `final`.

    That of step `best` stays besides, and so do those that a kept one builds on. Damaged ones do not count,
    and go once there are `keep` newer ones; so do those that were set aside. What cannot be deleted now is
    said, and is deleted by a later save.

    Args:
        refused: names of some whose files have their sizes, and are of no use all the same.
    """
    try:
        _retire(folder, final, keep, best, refused)
    except OSError as error:
        _say_left(folder, error)


def _retire(folder: Path, final: Path, keep: int, best: int, refused: Collection[str]) -> None:
    good, needed, oldest = 0, set[str](), -1
    bests = _bests(folder, best, refused)
    for old in checkpoints(folder):
        kept = step_of(old) > step_of(final) or good < keep or old in bests
        if step_of(old) <= step_of(final) and good < keep and old.name not in refused and _reads(old):
            good, oldest = good + 1, step_of(old)
        # A delta is deleted before what it builds on, so that what is left is never half a chain.
        if kept or old.name in needed or not _deleted(old):
            # One that cannot be read builds on nothing that could be loaded with it.
            with suppress(CheckpointError):
                base = read_state(old).get("base")
                needed |= {base["name"]} if isinstance(base, dict) else set()
    for aside in [] if is_remote(folder) else folder.glob("step-*.refused-*"):
        match = _ASIDE.fullmatch(aside.name)
        if match and good == keep and int(match[1]) < oldest:
            _deleted(aside)


def _bests(folder: Path, step: int, refused: Collection[str]) -> list[Path]:
    """What is kept of a step: of several checkpoints in a store the good one that was written last."""
    found = of_step(folder, step) if step >= 0 else []
    good = [path for path in found if path.name not in refused and _reads(path)] if len(found) > 1 else []
    return [max(good, key=lambda path: written_at(path / DIGEST))] if good else found


def _reads(path: Path) -> bool:
    """Whether a checkpoint has all its files in their sizes."""
    with suppress(CheckpointError):
        read_manifest(path)
        return True
    return False


def _deleted(path: Path) -> bool:
    """Delete a folder -> whether that is done."""
    try:
        retire_folder(path, path.name, strict=True)
    except OSError as error:
        _say_left(path, error)
        return False
    return True


def _say_left(path: Path, error: OSError) -> None:
    what = f"what is no longer kept could not be deleted: {error.strerror or error}"
    voice.say(f"{path}: {what}; the new checkpoint is in place, and a later save tries again")


def _object(file: Path, text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError as error:
        raise CheckpointError(file, f"unreadable: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(file, "is not a JSON object")
    return tree
