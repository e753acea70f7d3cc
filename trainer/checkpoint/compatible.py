"""What a run may change between two starts, and what it may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embeddings.errors import ConfigError
from trainer.assemble import flat_settings
from trainer.log.schema import LogManifest
from trainer.run_config import Config

# Another value of these would make a position inside an epoch mean other blocks.
_ORDER = (
    "data.history_length",
    "data.requests_per_block",
    "data.behaviors_per_block",
    "data.order",
    "data.shuffle_row_groups",
    "data.on_bad",
    "train.seed",
)


def log_fingerprint(manifest: LogManifest) -> str:
    """What a log is to a run: its features, tasks and counts, whatever bytes or folder hold it."""
    splits = {name: info.model_dump(exclude={"files"}) for name, info in manifest.splits.items()}
    tree = {
        **manifest.model_dump(include={"features", "context", "numeric", "weighted", "tasks"}),
        "splits": splits,
    }
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def check_resumable(state: Mapping[str, Any], config: Config, fingerprint: str) -> None:
    """Refuse to continue a run as something else.

    Args:
        state: of the checkpoint (`config`, `log`, `cursor`).
        config: of this start; fingerprint: of this start's log.

    Raises:
        ConfigError: the log, the model or the tables differ, or, in the middle of an epoch, what orders it.
    """
    if state["log"] != fingerprint:
        raise ConfigError(
            f"this run was trained on another log than data.log = {config.data.log} (features or counts "
            "differ, so ids may mean other things); name another --out"
        )
    before, now = dict(flat_settings(state["config"])), dict(flat_settings(config.model_dump(mode="json")))
    fixed = [
        key for key in {**before, **now} if key.split(".")[0] in ("model", "tables") or _shapes_table(key)
    ]
    if state["cursor"]["blocks"]:
        fixed += _ORDER
    if any(branch.position for branch in config.model.all_branches().values()):
        # There is a number for each place in the history.
        fixed.append("data.history_length")
    for key in fixed:
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"this run was started with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "set it back, or name another --out"
            )


def changed_settings(state: Mapping[str, Any], config: Config) -> list[str]:
    """The settings in which a start that may go on differs from its checkpoint: `key = now (was before)`.

    Where a log or a plan lies is no difference.
    """
    before, now = dict(flat_settings(state["config"])), dict(flat_settings(config.model_dump(mode="json")))
    return [
        f"{key} = {value!r} (was {before[key]!r})"
        for key, value in now.items()
        if key in before and before[key] != value and key not in ("data.log", "plan.file")
    ]


def check_same_order(path: Path, state: Mapping[str, Any], order: str, log: Path) -> None:
    """Refuse to go on inside an epoch whose rows lie elsewhere by now; `order`: of this start's reader.

    Raises:
        ConfigError: they do.
    """
    if state["cursor"]["blocks"] and state["order"] != order:
        raise ConfigError(
            f"{path} stands inside an epoch, and the rows of {log} lie in other files or another order since "
            "(or other row groups are skipped), so some would be read twice and some never; give the log as "
            "it was, or name another --out"
        )


def _shapes_table(key: str) -> bool:
    return key.startswith("groups.") and not key.endswith(
        (".learning_rate", ".sharding", ".stochastic_rounding")
    )
