"""Lines that every model must beat, as runs of their own: counts of the user's past, and a tree on counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from pydantic import PositiveInt

from benchmarks.tree import Samples, TreeSettings, predict, read_samples, settings_to_try, tried
from trainer.config.sections import DataConfig
from trainer.config.toml import Settings
from trainer.data.reader import SequenceLogReader
from trainer.quality.baselines import baselines
from trainer.quality.metrics import entry_of
from trainer.quality.scored import Scored
from trainer.run_folder import RunFolder, versions
from trainer.sealed_folder import replacing

OPENED = "test-opened.txt"
# Of the order in which settings of the tree are tried.
SEED = 17


class LineSettings(Settings):
    """What decides a line: the log; of the tree the settings that are tried, and its trees at most."""

    log: Path
    trials: PositiveInt = 6
    iterations: PositiveInt = 300


def own_count(settings: LineSettings, run: Path) -> tuple[Scored, bool]:
    """How often the user's visible history holds the candidate's finest category, or its item without any."""
    return _of_baselines(settings, run, ("category_count", "item_count"), probable=False), False


def label_rate(settings: LineSettings, run: Path) -> tuple[Scored, bool]:
    """What labels of the training split say of a user and an item (`user_item_rate` of `evaluate`)."""
    return _of_baselines(settings, run, ("user_item_rate", "mean_label"), probable=True), True


def _of_baselines(settings: LineSettings, run: Path, names: Sequence[str], probable: bool) -> Scored:
    """The first of these baselines that there is; a constant where there is none."""

    def scored(split: str) -> Scored:
        found = baselines(SequenceLogReader(DataConfig(log=settings.log), split, None))
        scores = []
        for of_task in found.scores.values():
            known = (of_task[name] for name in names if name in of_task)
            score = next(known, np.full(found.candidates.size, 0.5))
            # Counts in the same order, but between 0 and 1 as scores of files must be.
            scores.append(score if probable else score / (1 + score))
        return replace(found.candidates, score=np.stack(scores, axis=1))

    began = time.process_time(), time.perf_counter()
    return _measured(RunFolder(run), scored, 0, began, probable)


def tree(settings: LineSettings, run: Path) -> tuple[Scored, bool]:
    """A gradient-boosted tree on counts for each task, its settings chosen by validation (`bench tree`)."""
    began = time.process_time(), time.perf_counter()
    train = read_samples(settings.log, "train", 0)
    validation = read_samples(settings.log, "validation", 0)
    models = [
        _best_tree(run, train.of_task(task), validation.of_task(task), settings)
        for task in range(len(train.tasks))
    ]
    count = train.features.shape[0]
    del train

    def scored(split: str) -> Scored:
        samples = validation if split == "validation" else read_samples(settings.log, split, 0)
        scores = [predict(model, samples.features, trees) for model, trees in models]
        nothing = np.full(samples.user.size, -1)
        score = np.stack(scores, axis=1)
        keys = samples.user, samples.request, samples.candidate, nothing, nothing
        return Scored(score, samples.labels, *keys, samples.tasks).in_order()

    return _measured(RunFolder(run), scored, count, began, probable=True), True


LINES: dict[str, Callable[[LineSettings, Path], tuple[Scored, bool]]] = {
    "own_count": own_count,
    "label_rate": label_rate,
    "tree": tree,
}
"""The lines by name: each leaves the summary of a run in a folder, and gives the scores of the test split and
whether they are probabilities."""


def _best_tree(run: Path, train: Samples, validation: Samples, settings: LineSettings) -> tuple[Any, int]:
    """The best tree of a task and how many of its trees count. Settings that were tried are not tried again:
    each is a line of a file, and the best tree so far lies beside it."""
    (task,) = train.tasks
    file, best = run / f"trials-{task}.jsonl", run / f"tree-{task}.joblib"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    seen = [TreeSettings(**each["settings"]) for each in known]
    to_try = [each for each in settings_to_try(settings.trials, SEED) if each not in seen]
    highest = max((each["auc"] for each in known), default=-1.0)
    for trial in tried(train, validation, to_try, settings.iterations, SEED):
        if trial.auc > highest:
            highest = trial.auc
            with replacing(best) as part:
                joblib.dump((trial.tree, trial.iterations), part)
        with file.open("a", encoding="utf-8") as lines:
            entry = {"settings": asdict(trial.settings), "auc": trial.auc, "trees": trial.iterations}
            lines.write(json.dumps(entry) + "\n")
        print(f"{task}: {trial.settings.told()}: validation AUC {trial.auc:.4f}", flush=True)
    model, trees = joblib.load(best)
    return model, trees


def _measured(
    folder: RunFolder, scored: Callable[[str], Scored], count: int, began: Sequence[float], probable: bool
) -> Scored:
    """Leave `summary.json` as a training and its evaluations leave it; the scores of the test split."""
    entries: dict[str, Any] = {"samples": count, "steps": 0, "versions": versions()}
    entries |= {"cpu_s": time.process_time() - began[0], "wall_s": time.perf_counter() - began[1]}
    folder.path.mkdir(parents=True, exist_ok=True)
    validation = scored("validation")
    open_test(folder.path)
    found = {"validation": validation, "test": scored("test")}
    for split, of_split in found.items():
        metrics: Mapping[str, Any] = entry_of(of_split.all_metrics())
        entries[split] = metrics if probable else _only_order(metrics)
    folder.update_summary(entries)
    return found["test"]


def open_test(run: Path) -> None:
    """Count, in a file of the run, that its test split is read now."""
    with (run / OPENED).open("a", encoding="utf-8") as file:
        file.write("opened\n")


def _only_order(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without what would need probabilities."""
    needs = ("logloss", "ne", "pcoc", "ece", "logloss_ci", "pcoc_ci")
    plain = {name: (None if name in needs else value) for name, value in metrics.items()}
    plain["tasks"] = {
        task: _only_order({**own, "tasks": {}}) for task, own in metrics.get("tasks", {}).items()
    }
    return plain
