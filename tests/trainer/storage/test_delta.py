"""Incremental checkpoints in a store: written, read as one, and kept with what they build on."""

from __future__ import annotations

import pytest
import torch

from embeddings.errors import CheckpointError
from tests.helpers.object_store import Store, few
from tests.helpers.touched_tables import STATE, TouchedTable
from trainer.checkpoint import files, save_load
from trainer.checkpoint.background import Saver
from trainer.checkpoint.tensors import TensorReader
from trainer.config.sections import CheckpointConfig
from trainer.ranks.process_group import process_group
from trainer.sealed_folder import DIGEST


def test_a_store_that_cannot_be_asked_ends_no_run_that_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lines = store.bucket / "runs" / "away" / "checkpoints", list[str]()
    with process_group(60, "cpu"):
        table = TouchedTable(3_000, 4, 2_000, 4, torch.float16)
        config = CheckpointConfig(mode="sync", full_every=9, on_error="continue")
        saver = Saver(folder, config, lines.append, touched=table)  # type: ignore[arg-type]

        def save(step: int) -> None:
            table.touch(torch.tensor([step, 2_000 + step]))
            saver.save(step, table.tensors(), {"step": step})

        save(1)
        store.faults(("GET PUT POST HEAD DELETE", "away", "error:403:ExpiredToken", 1000))
        save(2)
        assert len(lines) == 2 and lines[1].startswith("not saved, training goes on"), lines
        store.faults()
        save(3)
        save(4)
        # What the save that failed was to hold is in the next one, which is full.
        paths = files.checkpoints(folder)
        assert [files.step_of(path) for path in paths] == [4, 3]
        bases = [(files.read_state(path).get("base") or {}).get("name") for path in paths]
        assert bases == [paths[1].name, None]


def test_a_chain_in_a_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.bucket / "runs" / "deltas" / "checkpoints"
    with process_group(60, "cpu"):
        table, held = TouchedTable(3_000, 4, 2_000, 4, torch.float16), []
        config = CheckpointConfig(mode="sync", keep=1, full_every=3)
        saver = Saver(folder, config, lambda line: None, touched=table)  # type: ignore[arg-type]
        for step in range(1, 7):
            table.touch(torch.tensor([step, 2_000 + step, 2_999]))
            saver.save(step, table.tensors(), {"step": step})
            held.append(table.contents())
        # The newest, and what it builds on.
        paths = files.checkpoints(folder)
        assert [files.step_of(path) for path in paths] == [6, 5, 4]
        bases = [(files.read_state(path).get("base") or {}).get("name") for path in paths]
        assert bases == [paths[1].name, paths[2].name, None]
        found = save_load.find(folder)
        assert found.path == paths[0] and not found.refused
        table.zero()
        save_load.load_tensors(paths[0], table.tensors())
        for name, tensor in held[-1].items():
            assert torch.equal(table.contents()[name], tensor), name
        assert torch.equal(TensorReader(paths[1]).whole(STATE), held[-2][STATE])
        # A store that does not answer says nothing about the base: no older checkpoint is taken.
        few(monkeypatch)
        store.faults(("GETHEAD", f"{paths[1].name}/manifest", "error:500:InternalError", 1))
        with pytest.raises(OSError, match="the store failed, again"):
            save_load.find(folder)
        store.faults()
        # Without its base a delta is of no use.
        (paths[2] / DIGEST).unlink()
        with pytest.raises(CheckpointError, match=f"builds on {paths[2].name}"):
            save_load.find(folder)
