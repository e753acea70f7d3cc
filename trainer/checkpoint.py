"""Checkpoints for resuming: written whole or not at all, and never loaded unverified.

A checkpoint is a directory `step-########` that holds torch.distributed.checkpoint shards, `state.json`
(rank-independent state) and `manifest.json` (size and SHA-256 of every file). It is written to
`step-########.tmp-<id>`, hashed, synced and renamed. Loading verifies every digest first: DCP itself reads
flipped bits without complaint, and unpickles its metadata. A manifest stops corruption, not somebody who can
rewrite it: checkpoints are trusted input, snapshots are what may come from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from embeddings.errors import CheckpointError
from trainer.durable import file_digest, sync

_NAME = re.compile(r"step-(\d{8})$")
_MANIFEST, _STATE = "manifest.json", "state.json"


def save(folder: Path, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], keep: int) -> Path:
    """Write one checkpoint; collective over all ranks.

    Args:
        folder: the run's `checkpoints` folder.
        step: steps done.
        tensors: state dict for DCP (model and optimizers).
        state: JSON-able rank-independent state.
        keep: newest checkpoints to keep; older ones are deleted after the new one is in place.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing older is touched.
    """
    final = folder / f"step-{step:08d}"
    run_id = _shared_id(final)
    if not run_id:
        return final
    part = folder / f"{final.name}.tmp-{run_id}"
    _together(final, lambda: _prepare(folder, part))
    _together(final, lambda: dcp.save(dict(tensors), checkpoint_id=part), every_rank=True)
    _together(final, lambda: _publish(part, final, state, run_id))
    _together(final, lambda: _retire(folder, final, keep))
    return final


@dataclass(frozen=True)
class Found:
    """What is there to resume from.

    Attributes:
        path: the newest checkpoint that verifies, None where there is none at all.
        state: its rank-independent state; refused: why newer ones were refused.
    """

    path: Path | None
    state: dict[str, Any]
    refused: list[str]


def find(folder: Path) -> Found:
    """Look for the newest good checkpoint; collective. Rank 0 verifies, the others take its word.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
    """
    answers: list[Any] = [None]
    if dist.get_rank() == 0:
        path, refused = newest(folder)
        state, problem = ({}, "") if path is None else _try_state(path)
        answers = [(path, state, refused, problem)]
    dist.broadcast_object_list(answers, src=0)
    path, state, refused, problem = answers[0]
    if problem or (path is None and refused):
        why = problem or "no checkpoint verifies; use another --out, or restore one"
        raise CheckpointError(folder, f"{why} ({'; '.join(refused)})" if refused else why)
    return Found(path, state, refused)


def _try_state(path: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_state(path), ""
    except CheckpointError as error:
        return {}, str(error)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """-> (newest checkpoint that verifies or None, why newer ones were refused)."""
    refused = []
    found = sorted((p for p in folder.glob("step-*") if _NAME.search(p.name)), reverse=True)
    for path in found:
        try:
            verify(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            return path, refused
    return None, refused


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the file that is missing, extra, short or changed.
    """
    entries = _read_json(path, _MANIFEST).get("files")
    if not isinstance(entries, dict):
        raise CheckpointError(path / _MANIFEST, "holds no file list; delete this checkpoint")
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {_MANIFEST}
    for name in sorted(present ^ set(entries)):
        raise CheckpointError(path / name, "missing" if name in entries else "not in the manifest")
    for name, entry in sorted(entries.items()):
        if (path / name).stat().st_size != entry["bytes"] or file_digest(path / name) != entry["sha256"]:
            raise CheckpointError(path / name, "does not match the manifest; the checkpoint is corrupt")


def read_state(path: Path) -> dict[str, Any]:
    """The rank-independent state of a verified checkpoint."""
    return _read_json(path, _STATE)


def load_tensors(path: Path, tensors: dict[str, Any], *, distributed: bool = True) -> None:
    """Fill a state dict in place from a verified checkpoint, whatever plan or world size wrote it."""
    try:
        dcp.load(tensors, checkpoint_id=path, no_dist=not distributed)
    except (RuntimeError, ValueError, OSError, dcp.api.CheckpointException) as error:
        raise CheckpointError(path, f"does not fit this configuration: {_reason(error)}") from None


def _prepare(folder: Path, part: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()


def _publish(part: Path, final: Path, state: Mapping[str, Any], run_id: str) -> None:
    (part / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = {}
    for file in sorted(p for p in part.rglob("*") if p.is_file()):
        files[str(file.relative_to(part))] = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
        sync(file)
    manifest = part / _MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    sync(manifest)
    sync(part)
    if final.exists():
        # It did not verify; kept aside for whoever wants to know why.
        final.rename(final.with_name(f"{final.name}.refused-{run_id}"))
    part.rename(final)
    sync(final.parent)


def _retire(folder: Path, final: Path, keep: int) -> None:
    """Never what was just written, nor anything beyond it that somebody may want to look at."""
    found = sorted(p for p in folder.glob("step-*") if _NAME.search(p.name) and p.name <= final.name)
    for old in found[:-keep]:
        shutil.rmtree(old)


def _reason(error: BaseException) -> str:
    """The first line that says something: DCP wraps what happened on each rank."""
    failures = getattr(error, "failures", None)
    cause = next(iter(failures.values()))[0] if failures else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def _shared_id(final: Path) -> str:
    """One random name for all ranks; empty where this step's checkpoint is there and verifies."""
    names = [os.urandom(4).hex()]
    if dist.get_rank() == 0 and final.exists():
        with suppress(CheckpointError):
            verify(final)
            names = [""]
    dist.broadcast_object_list(names, src=0)
    return str(names[0])


def _together(path: Path, action: Callable[[], object], every_rank: bool = False) -> None:
    """Run on rank 0 (or on every rank); a failure anywhere is a CheckpointError everywhere."""
    problem = ""
    if every_rank or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            # Whatever it was, the other ranks wait in the next collective and must hear of it.
            problem = f"rank {dist.get_rank()} could not save: {_reason(error)}"
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [text for text in problems if text]
    if failed:
        raise CheckpointError(path, f"{failed[0]}; older checkpoints are untouched")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        tree = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(path / name, f"unreadable: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(path / name, "is not a JSON object")
    return tree
