"""What a run leaves aside, said once before its first step: parts of the log, and settings without effect.

Nothing a user gave is dropped in silence: what cannot be used at all is refused where it is read; what a
configuration chooses not to use is named here, with what would use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from embeddings.groups import TableGroup
from trainer.config.model import CONTEXT_ROLES, section_of
from trainer.config.phases import DENSE, GROUP, TABLES, PhaseConfig
from trainer.config.similarity import without_effect
from trainer.config.tasks import Task, resolve_tasks
from trainer.config.toml import Settings
from trainer.data.similarity.encoding import features_of_tables, parts_by_similarity
from trainer.data.stream.source import SPLIT
from trainer.log.schema import LogManifest
from trainer.model.settings import AUXILIARY_KEYS, CONDITIONAL_KEYS, HEAD_KEYS, ModelConfig
from trainer.run_config import Config

_SPLITS = ("train", "validation", "test")
# Who lacks a feature of a side.
_OTHER = {"candidate": "history", "history": "candidate"}
# What the presets say; whoever sets steps beside it has said enough.
_TYPICAL_WARMUP = 0.08
# Settings of a group that say how its rows begin and are trained.
_OF_TRAINED_ROWS = (
    *("optimizer", "learning_rate", "eps", "max_gradient", "stochastic_rounding"),
    *("init", "init_scale", "init_like"),
)
# Measuring so many domains may take longer than scoring their candidates.
_MANY_DOMAINS = 1000


def remarks(config: Config, manifest: LogManifest, groups: Mapping[str, TableGroup]) -> list[str]:
    """One line for each kind of thing that this run will not use."""
    used, search = {feature for group in groups.values() for feature in group.features}, config.data.search
    # Losses and metrics read the domain, whether or not the model has a table of it.
    read = {*used, config.data.domain}
    lines = []
    if left := [f"tables.{name}" for name in config.tables if name not in used]:
        lines.append(f"no effect: {', '.join(left)}; no group has a table of that feature")
    # A number is used where any part of it is.
    known = {**features_of_tables(config.data, manifest), **manifest.table_context}
    read |= {known[name].field for name in used}
    if left := [name for name in manifest.context if name not in read]:
        names = ", ".join(f'"{name}"' for name in left)
        lines.append(
            f"not used: {_counted(left, 'context feature')} of the log; for the model to see them, set "
            f'groups.context.features = [{names}] and model.roles.context = "context"'
        )
    if left := [name for name in manifest.features if name not in {*read, *search.levels, search.domain}]:
        lines.append(
            f"not used: {_counted(left, 'feature')} of the log; name them in groups.<name>.features (left "
            "out, a group has all of them)"
        )
    if left := _one_sided(config, manifest):
        lines.append(
            f"no effect: {', '.join(left)}; the group is looked up for behaviors alone or for candidates "
            "alone, and only the other side carries the feature"
        )
    of_similarities = parts_by_similarity(config.data)
    if left := [f"data.similarity.{name}" for name, each in of_similarities.items() if not used & {*each}]:
        lines.append(f"not used: {', '.join(left)}; name it in groups.<name>.features, or leave it out")
    if manifest.clusters is not None and not config.data.clusters:
        lines.append(
            "not used: the log's clusters of behaviors; data.clusters and model.clusters search them"
        )
    info = {**manifest.features, **manifest.context}.get(config.data.domain)
    if info is not None and info.rows > _MANY_DOMAINS:
        lines.append(
            f'data.domain = "{config.data.domain}" has {info.rows:,} ids, and a validation measures each '
            "that it has; name a feature with fewer, or validate seldom"
        )
    tasks = resolve_tasks(config.tasks, manifest.tasks)
    lines += [*_of_tasks(tasks, manifest), *_splits(config, manifest)]
    owners = [each.owner for each in groups[config.model.roles.representation_behavior].sets]
    unread = config.model.head_kind.unread_keys(config.model, owners)
    alone = [task.name for task in tasks if task.has_tower]
    of_one = _of_one_task(config, alone[0]) if len(alone) == 1 else []
    if len(trained := config.lanes(tasks)) == 1:
        lines.append(
            f'no effect: update = "per_task", since {trained[0]} is the only task with a loss of its own'
        )
    if left := [*_of_model(config.model), *unread, *_of_rest(config), *_of_phases(config), *of_one]:
        lines.append(f"no effect in this configuration: {'; '.join(left)}")
    return lines


def _one_sided(config: Config, manifest: LogManifest) -> list[str]:
    """Features of a group whose tables are only looked up for those who do not have them."""
    known = {**features_of_tables(config.data, manifest), **manifest.features}
    needs: dict[str, set[str]] = {}
    for branch in config.model.all_branches().values():
        for role, group in branch.roles.model_dump().items():
            if group and role not in CONTEXT_ROLES:
                of_candidates = role.endswith("_target") or role == "prior"
                needs.setdefault(group, set()).add("candidate" if of_candidates else "history")
    return [
        f"{feature} in groups.{name}"
        for name, sides in needs.items()
        for feature in config.groups[name].features or manifest.features
        if feature in known and sides == {_OTHER.get(known[feature].side)}
    ]


def _of_tasks(tasks: Sequence[Task], manifest: LogManifest) -> Iterable[str]:
    """Labels that no task looks at, and tasks that training cannot observe."""
    used = {label for task in tasks for label in task.labels}
    if left := [label for label in manifest.tasks if label not in used]:
        yield f"not used: {_counted(left, 'label')} of the log; a section [tasks.{left[0]}] makes it a task"
    # Of logs that were made before labels could be missing, nothing is counted.
    found = manifest.splits["train"].labels if "train" in manifest.splits else {}
    never = {label for label, counts in found.items() if not counts.observed}
    for task in tasks:
        if missing := [label for label in task.labels if label in never]:
            yield (
                f"task {task.name} is not trained: no candidate of the training split has the label "
                f"{' or '.join(missing)}"
            )
    observed = {label: counts.observed for label, counts in found.items()}
    by_name = {task.name: task for task in tasks}
    for task in tasks:
        first = by_name[task.settings.product[0]] if task.settings.product else task
        known, wanted = observed.get(task.label, 0), observed.get(first.label, 0)
        if 0 < known < wanted:
            yield (
                f"tasks.{task.name}: a product is to be known on all candidates of {first.name}, with the "
                f"label 0 where a factor did not happen, but {task.label} was observed on {known:,} of "
                f"{wanted:,}; if the log has such a label, set tasks.{task.name}.label"
            )


def _splits(config: Config, manifest: LogManifest) -> Iterable[str]:
    def requests(split: str) -> int:
        return manifest.splits[split].requests if split in manifest.splits else 0

    if [*manifest.splits] == [SPLIT]:
        # A window of a stream, which is measured before it is trained.
        return
    if not requests("validation"):
        every = config.train.validate_every
        beside = f", so train.validate_every = {every} has no effect" if every else ""
        yield f"the log has no validation requests: nothing is measured while training{beside}"
    if not requests("test"):
        yield "the log has no test requests: `evaluate` needs --split with one that has"
    for split in manifest.splits:
        if split not in _SPLITS and requests(split):
            yield f"not used: split {split!r} with {requests(split):,} requests"


def _of_model(model: ModelConfig) -> list[str]:
    """Keys of the model that no branch looks at, where they were given another value than the default."""
    used = set[str]().union(*(branch.keys_with_effect() for branch in model.all_branches().values()))
    unused = [
        f"model.{key} = {getattr(model, key)!r}"
        for key in type(model).model_fields
        if key in CONDITIONAL_KEYS - used and _changed(model, key)
    ]
    unused += [
        f'model.{key} (model.head is "{model.head}")'
        for key in HEAD_KEYS
        if key not in model.head_kind.keys.model_fields and _changed(model, key)
    ]
    kind = model.auxiliary_kind
    keys = ["auxiliary_weight", "auxiliary_hidden"] if kind is None else []
    keys += [key for key in AUXILIARY_KEYS if kind is None or key not in kind.keys.model_fields]
    unused += [
        f'model.{key} = {getattr(model, key)!r} (model.auxiliary is "{model.auxiliary}")'
        for key in keys
        if _changed(model, key)
    ]
    return unused


def _of_one_task(config: Config, task: str) -> list[str]:
    """What keeps tasks apart, where there is one."""
    why, model = f"({task} is the only task with a tower)", config.model
    left = [
        f'groups.{name}.sets = "tasks" {why}' for name, each in config.groups.items() if each.sets == "tasks"
    ]
    foreign = getattr(getattr(model, "experts", None), "foreign", "open")
    if foreign != "open" and model.head_kind.takes_towers:
        left.append(f'model.experts.foreign = "{foreign}" {why}')
    for branch, settings in model.all_branches().items():
        if settings.attention_owner and "attention_owner" in settings.keys_with_effect():
            left.append(f"{section_of(branch)}.attention_owner = {settings.attention_owner!r} {why}")
    return left


def _of_phases(config: Config) -> Iterable[str]:
    """Keys of phases that nothing looks at."""
    for place, phase in enumerate(config.phases):
        where, average = f"phases.{place}", phase.average
        if again := sorted(set(phase.reset) & set(phase.reset_state)):
            yield f"{where}.reset_state = {again[0]!r} (reset has it, too)"
        if average.kind != "beta" and _changed(average, "beta"):
            yield f'{where}.average.beta (average.kind is "{average.kind}")'
        if average.kind != "ema" and _changed(average, "decay"):
            yield f'{where}.average.decay (average.kind is "{average.kind}")'
        if average.on and not average.adopt and place + 1 < len(config.phases):
            yield f"{where}.average (it ends with the phase, which is not the last one, and is not adopted)"
        yield from _of_given(config.given_groups, phase, where)
        for group in phase.table_learning_rates:
            if {TABLES, f"{GROUP}{group}"} & set(phase.freeze):
                yield f"{where}.table_learning_rates.{group} (the group is frozen)"
        if DENSE in phase.freeze and phase.learning_rate is not None:
            yield f"{where}.learning_rate (everything dense is frozen)"


def _of_given(groups: Iterable[str], phase: PhaseConfig, where: str) -> Iterable[str]:
    """What a phase does to groups whose rows are pre-trained, which nothing changes."""
    for group in sorted(groups):
        if group in phase.table_learning_rates:
            yield f"{where}.table_learning_rates.{group} (its rows are pre-trained, and nothing trains them)"
        for key in ("freeze", "train", "reset", "reset_state"):
            if f"{GROUP}{group}" in getattr(phase, key):
                yield f"{where}.{key} = '{GROUP}{group}' (its rows are pre-trained, and stay)"


def _of_rest(config: Config) -> list[str]:
    data, train = config.data, config.train
    search = data.search
    unused = [
        f"groups.{name}.{key} (its rows are pre-trained: groups.{name}.vectors)"
        for name in sorted(config.given_groups)
        for key in _OF_TRAINED_ROWS
        if _changed(config.groups[name], key)
    ]
    if not search.levels:
        unused += [
            f"data.search.{key} (data.search.levels is empty)"
            for key in ("budget", "half_life_days", "counts", "domain", "domain_minimum")
            if _changed(search, key)
        ]
    elif search.domain_minimum and not search.domain:
        unused.append("data.search.domain_minimum (data.search.domain is empty)")
    unused += without_effect(
        data.vectors, data.similarity, {group.vectors for group in config.groups.values()}
    )
    if data.recent and not (search.levels or data.clusters):
        unused.append(f"data.recent = {data.recent} (neither data.search nor data.clusters cuts the history)")
    if data.order == "stored" and _changed(data, "shuffle_row_groups"):
        unused.append('data.shuffle_row_groups (data.order is "stored")')
    if data.on_bad == "fail" and _changed(data, "max_bad"):
        unused.append('data.max_bad (data.on_bad is "fail")')
    if _changed(train, "objective") and config.tasks and all(task.loss for task in config.tasks.values()):
        unused.append("train.objective (every task names a loss of its own)")
    means = [task.mean or task.loss == "none" for task in config.tasks.values()]
    if _changed(train, "mean") and means and all(means):
        unused.append("train.mean (every task has a mean of its own, or no loss)")
    unused += [
        f'tasks.{name}.mean = "domain" for the ranking loss (its pairs are not those of a domain)'
        for name, task in config.tasks.items()
        if task.mean == "domain" and task.rank != "none" and task.pairs != "domain"
    ]
    if train.init_optimizer != "carry" and not train.init_from:
        unused.append("train.init_optimizer (train.init_from is empty)")
    if not train.early_stopping.on:
        unused += [
            f"train.early_stopping.{key} (train.early_stopping.patience is 0)"
            for key in ("metric", "task", "min_delta")
            if _changed(train.early_stopping, key)
        ]
    if train.warmup and train.warmup_steps is not None and train.warmup != _TYPICAL_WARMUP:
        unused.append(f"train.warmup (train.warmup_steps = {train.warmup_steps} counts instead)")
    return unused


def _changed(section: Settings, key: str) -> bool:
    default = type(section).model_fields[key].get_default(call_default_factory=True)
    return bool(getattr(section, key) != default)


def _counted(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({', '.join(names)})"
