"""What a run may change between two starts, and what it may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from embeddings.errors import CheckpointError, ConfigError
from embeddings.groups import TableName
from embeddings.optimizers import ROW_OPTIMIZERS
from trainer.config.sets import sets_of
from trainer.config.tasks import resolve_tasks
from trainer.config.toml import flat_settings
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
_GROUP_SETTINGS_THAT_MAY_CHANGE = (".learning_rate", ".sharding", ".stochastic_rounding")
# Written by `embeddings.plan.file`: its "modules" are module -> table -> {"sharding_type", "shards", ...}.
PlanTree = Mapping[str, Any]


# What the manifests of earlier versions do not say of a feature.
_NEW_OF_FEATURES = ("raw", "hashed")


def log_fingerprint(manifest: LogManifest) -> str:
    """What a log is to a run: its features, tasks and counts, whatever bytes or folder hold it."""
    # What older logs do not say is left out where it says nothing, so that their fingerprints stay.
    splits = {name: info.model_dump(exclude={"files", "labels"}) for name, info in manifest.splits.items()}
    tree = {
        **manifest.model_dump(include={"features", "context", "numeric", "weighted", "tasks"}),
        **manifest.model_dump(include={"partial", "label_weights"}, exclude_defaults=True),
        "splits": splits,
    }
    for info in (*tree["features"].values(), *tree["context"].values()):
        for name in _NEW_OF_FEATURES:
            if not info.get(name, True):
                del info[name]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def check_resumable(
    state: Mapping[str, Any], config: Config, fingerprint: str, labels: Sequence[str] = ()
) -> None:
    """Refuse to continue a run as something else.

    Args:
        state: of the checkpoint (`config`, `log`, `cursor`).
        config: of this start; fingerprint: of this start's log; labels: that the log has.

    Raises:
        ConfigError: the log, the model or the tables differ, or, in the middle of an epoch, what orders it.
    """
    if state["log"] != fingerprint:
        raise ConfigError(
            f"this run was trained on another log than data.log = {config.data.log} (features or counts "
            "differ, so ids may mean other things); name another --out"
        )
    before, now = _settings_of(state), _flat(config)
    fixed = []
    for key in {**before, **now}:
        section = key.split(".")[0]
        shapes_table = section == "groups" and not key.endswith(_GROUP_SETTINGS_THAT_MAY_CHANGE)
        if section in ("model", "tables") or shapes_table or _shapes_map(key) or _compares_vectors(key):
            fixed.append(key)
    if state["cursor"]["blocks"]:
        fixed += _ORDER
    if any(branch.position for branch in config.model.all_branches().values()):
        # There is a number for each place in the history.
        fixed.append("data.history_length")
    _check_lanes(state, config, labels)
    names, names_now = _names(state["config"]), _names(config.model_dump(mode="json"))
    for key in {**names, **names_now}:
        if names.get(key, []) != names_now.get(key, []):
            # The other one has a number or a word instead of names.
            before[key] = ", ".join(names[key]) if key in names else before.get(key)
            now[key] = ", ".join(names_now[key]) if key in names_now else now.get(key)
            # Before the single keys that then differ, too.
            fixed.insert(0, key)
    alike = [f"groups.{name}.sets" for name in _same_sets(state, config, labels)]
    for key in fixed:
        if key in alike or key.startswith(tuple(f"{sets}." for sets in alike)):
            continue
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"this run was started with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "set it back, or name another --out"
            )


def _compares_vectors(key: str) -> bool:
    """Whether a setting decides what the ids of a similarity stand for; files may lie elsewhere."""
    return key.startswith(("data.vectors.", "data.similarity.")) and not key.endswith(".file")


def _shapes_map(key: str) -> bool:
    """Whether a setting decides which rows a map of ids has to give."""
    section, _, rest = key.partition(".")
    _, _, setting = rest.partition(".")
    return section == "ids" and (setting in ("capacity", "shared_rows") or setting.startswith("groups."))


def _check_lanes(state: Mapping[str, Any], config: Config, labels: Sequence[str]) -> None:
    """Refuse to go on with other states of tasks: other lanes of tables, or another optimizer."""
    try:
        given = Config.model_validate(state["config"])
        before, now = ((sorted(each.rules), _with_states(each, labels)) for each in (given, config))
    except (ConfigError, ValidationError):
        # Of another version, or of tasks that are not there: both are told elsewhere.
        return
    words = [
        " and ".join(rules) + (f" with states of the tasks {', '.join(tasks)}" if tasks else "")
        for rules, tasks in (before, now)
    ]
    if words[0] != words[1]:
        raise ConfigError(
            f"this run was started with the update rule {words[0]}, now it is {words[1]} (train.update, "
            "phases.*.update, weights and products of tasks); set it back, or start a new run from these "
            "weights with --init-from"
        )


def _with_states(config: Config, labels: Sequence[str]) -> list[str]:
    """The tasks that have states of their own; a product with the factors whose weights it reaches."""
    tasks = resolve_tasks(config.tasks, labels)
    lanes = config.lanes(tasks)
    return [
        task.name if task.has_tower else f"{task.name} = {' * '.join(sorted(task.towers))}"
        for task in tasks
        if task.name in lanes
    ]


def _settings_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint; a key that its version did not know has its default, with no effect.

    What this version cannot take at all stays as it was written.
    """
    try:
        given = Config.model_validate(state["config"]).model_dump(mode="json")
    except ValidationError:
        given = state["config"]
    return dict(flat_settings(given))


def _same_sets(state: Mapping[str, Any], config: Config, labels: Sequence[str]) -> list[str]:
    """The groups that have the same sets as before, however these are written."""
    with suppress(ConfigError, ValidationError):
        before, now = (_sets(each, labels) for each in (Config.model_validate(state["config"]), config))
        return [name for name, sets in now.items() if before.get(name) == sets]
    return []


def _sets(config: Config, labels: Sequence[str]) -> dict[str, Any]:
    """The sets of each group one by one, in their order, with owner and width."""
    tasks = resolve_tasks(config.tasks, labels)
    rows = {
        each.owner
        for group in config.groups.values()
        if isinstance(group.sets, dict)
        for each in group.sets.values()
    }
    domains = 1 + max(
        (int(owner.removeprefix("domain:")) for owner in rows if owner.startswith("domain:")), default=0
    )
    return {
        name: [
            (each, settings.dim or group.dim)
            for each, settings in sets_of(name, group, tasks, domains).items()
        ]
        for name, group in config.groups.items()
    }


def _names(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The sets of each group that names them, in their order, by which columns go."""
    groups = {f"groups.{name}.sets": group.get("sets") for name, group in settings["groups"].items()}
    return {key: list(named) for key, named in groups.items() if isinstance(named, Mapping)}


def changed_settings(state: Mapping[str, Any], config: Config) -> list[str]:
    """The settings in which a start that may go on differs from its checkpoint: `key = now (was before)`.

    A key that the checkpoint's version did not know had its default, with no effect; one whose default is
    another by now is a difference, and is told as that. Where a log or a plan lies is none.
    """
    defaults, given = _flat(Config()), dict(flat_settings(state["config"]))
    before, lines = {**defaults, **_settings_of(state)}, []
    now = _flat(config)
    if (count := len(config.phases)) != (former := len(state["config"].get("phases", ()))):
        lines.append(f"phases: {count} now (was {former})")
    for key, value in now.items():
        if key not in before or before[key] == value or key in ("data.log", "plan.file"):
            continue
        default = "; now the default" if key in defaults and value == defaults[key] else ""
        was = f"was {before[key]!r}{default}" if key in given else "was not set"
        lines.append(f"{key} = {value!r} ({was})")
    return lines


def _flat(config: Config) -> dict[str, Any]:
    return dict(flat_settings(config.model_dump(mode="json")))


def check_same_order(path: Path, state: Mapping[str, Any], order: str, log: Path) -> None:
    """Refuse to go on inside an epoch whose rows lie elsewhere by now; `order`: of this start's reader.

    Raises:
        ConfigError: they do.
    """
    # The windows of a stream are compared by what the checkpoint says of them.
    if state["cursor"]["blocks"] and "stream" not in state and state["order"] != order:
        raise ConfigError(
            f"{path} stands inside an epoch, and the rows of {log} lie in other files or another order since "
            "(or other row groups are skipped), so some would be read twice and some never; give the log as "
            "it was, or name another --out"
        )


def check_reshardable(path: Path, state: Mapping[str, Any], now: PlanTree) -> None:
    """Refuse state that its optimizer cannot bring to tables that are cut into columns differently.

    Row-wise Adagrad keeps an accumulator for each row *and column shard* (the mean square of the gradients
    in those columns), so the saved ones are not those of other columns. Everything else reshards.

    Args:
        path: the checkpoint; state: its state, whose `plan` may be missing; now: the plan of this start.

    Raises:
        CheckpointError: naming the table, before anything is loaded.
    """
    groups = state["config"]["groups"]
    before, after = _tables(state.get("plan", {})), _tables(now)
    for table in sorted(before.keys() & after.keys()):
        name = TableName.of(table)
        optimizer = groups.get(name.group, {}).get("optimizer", "") if name else ""
        types = [str(entry.get("sharding_type")) for entry in (before[table], after[table])]
        if _columns(before[table]) == _columns(after[table]) or not optimizer:
            continue
        rule = ROW_OPTIMIZERS[optimizer]
        if not rule.state_reshards(*types):
            raise CheckpointError(
                path,
                f"table {table} lay {_layout(before[table])}, now {_layout(after[table])}: {rule.title} has "
                "one accumulator a row and column shard, so its state cannot follow; set "
                "groups.<name>.sharding and the number of ranks back, or start a new run from these weights "
                "with --init-from",
            )


def _tables(plan: PlanTree) -> dict[str, Mapping[str, Any]]:
    return {table: entry for tables in plan.get("modules", {}).values() for table, entry in tables.items()}


def _columns(entry: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shards of a table that is cut into columns; one of all where it is not, however rows are cut."""
    shards = entry.get("shards") or []
    found = {(*shard["offsets"], *shard["sizes"]) for shard in shards}
    return sorted(found) if len({place[1:2] for place in found}) > 1 else [()]


def _layout(entry: Mapping[str, Any]) -> str:
    count = len(_columns(entry))
    return f"{entry.get('sharding_type')} in {f'{count} pieces' if count > 1 else 'whole rows'}"
