"""Trained runs as they are analysed: a verified checkpoint each, of which nothing is loaded whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from embeddings.errors import CheckpointError, ConfigError, DataError
from embeddings.groups import TableGroup, TableSpec
from embeddings.ids.frozen import FrozenIds
from pipelines.export_source import check_tables
from trainer.assemble import id_bounds, resolve_groups
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.accumulators import updated
from trainer.checkpoint.id_files import frozen_ids
from trainer.checkpoint.tensors import TensorReader
from trainer.config.tasks import Task, resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.living_ids import looked_up
from trainer.data.reader import SequenceLogReader
from trainer.data.similarity.encoding import parts_of_numbers
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.run_folder import RunFolder
from trainer.snapshot.partial_model import PartialModel, rows_of_requests
from trainer.snapshot.writing import Source

# Of a table that are read at once.
_BAND_BYTES = 8 << 20


class NamedTable(NamedTuple):
    """A table of a run, by its group, its description and the name of its tensor in the checkpoint."""

    group: str
    spec: TableSpec
    tensor: str

    @property
    def name(self) -> str:
        """As people call it: GROUP / FEATURE, with the set between where there are several."""
        return " / ".join(part for part in (self.group, self.spec.set, self.spec.feature) if part)


@dataclass(frozen=True)
class AnalysedRun:
    """One run and the checkpoint of it that is analysed.

    Attributes:
        name: unique among the runs of a report; label: that of its config, the same for all its seeds.
        seed: `train.seed` of the run.
        manifest: of the log that it trains on; step, checkpoint: that are analysed, verified.
        tensors: reads the checkpoint band by band; tables are never loaded whole.
        groups: its table groups; id_maps: of the features whose ids come and go.
        ranks: this process alone.
    """

    name: str
    label: str
    seed: int
    folder: RunFolder
    config: Config
    manifest: LogManifest
    step: int
    checkpoint: Path
    tensors: TensorReader
    groups: Mapping[str, TableGroup]
    ranks: Ranks
    id_maps: Mapping[str, FrozenIds] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        return resolve_tasks(self.config.tasks, self.manifest.tasks)

    def tables(self) -> Iterator[NamedTable]:
        """All tables, group by group and set by set; lanes are part of the rows of their main table."""
        for name, group in self.groups.items():
            for spec in group.tables:
                yield NamedTable(name, spec, self.tensors.table(name, group.table_name(spec)))

    def bands(self, table: NamedTable) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """A table from its first row to its last, some megabytes at a time.

        Returns:
            The first row, the rows [n, dim] as they are saved, and which of them ever had a gradient (bool
            [n]; None where the optimizer keeps no state that could tell).
        """
        for first, rows in self.tensors.bands(table.tensor, _BAND_BYTES):
            yield first, rows, updated(self.tensors, table.tensor, first, first + len(rows))

    def reader(self, split: str, limit: int = 0, candidates: int | None = None) -> SequenceLogReader:
        """Reads a split in stored order; ids that come and go are those of the log.

        Args:
            limit: about so many candidates are read, those of whole users; 0 = the whole split.
            candidates: of a step; None = as the run trained.

        Raises:
            DataError: the log has no such split, or is damaged.
        """
        self.manifest.require(split)
        changes = {} if candidates is None else {"batch_candidates": candidates}
        data = self.config.data.model_copy(update=changes)
        rows = id_bounds(self.groups, self.config)
        return SequenceLogReader(data, split, rows, tasks=self.tasks, limit=limit, manifest=self.manifest)

    def looked_up(self, batch: RequestBatch) -> RequestBatch:
        """The batch with rows of tables in the place of ids that come and go."""
        return looked_up(batch, self.id_maps)

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """Everything of the model but tables, under the names of its state dict."""
        return self._source().dense()

    def model(self, batches: Iterable[RequestBatch]) -> PartialModel:
        """The trained model, in eval mode, over only those rows of its tables that the batches touch.

        Args:
            batches: of `reader`; only these may be given to the model.

        Raises:
            CheckpointError: a weight that they need is NaN or infinite, so that no measure has a meaning.
        """
        for name, weight in self.dense.items():
            self._refuse_broken(name, weight)
        parts = parts_of_numbers(self.config.data, self.manifest)
        looked_up_ = (self.looked_up(batch) for batch in batches)
        found = rows_of_requests(looked_up_, self.groups, self.config, parts)
        keys = {self.groups[name].table_name(spec): spec.key for name, spec, _ in self.tables()}
        source = self._source()
        for name, spec, _ in self.tables():
            table = self.groups[name].table_name(spec)
            for first, rows in source.picked(name, table, found.ids[spec.key]):
                self._refuse_broken(table, rows)
                found.watch(keys, table, first, rows)
        return PartialModel(self.config, self.manifest, self.ranks, self.dense, found, self.id_maps)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty where there is none."""
        return self.folder.read_summary()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, in their order; one that a crash cut short is left out."""
        if not self.folder.metrics.exists():
            return []
        lines = []
        # Lines end by a line feed alone: a name inside of one may hold other separators.
        for text in self.folder.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                lines.append(line)
        return lines

    def _refuse_broken(self, name: str, weight: Tensor) -> None:
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise CheckpointError(self.checkpoint, f"{name} holds NaN or infinity; analyze an earlier one")

    def _source(self) -> Source:
        return Source(self.config, self.groups, self.tensors)


def open_runs(paths: Sequence[Path], ranks: Ranks, which: str = "") -> tuple[AnalysedRun, ...]:
    """Find and verify a checkpoint of each run.

    Raises:
        ConfigError: a folder is no run, or is named twice. CheckpointError: a run has no usable checkpoint.
        DataError: its log is not there.
    """
    places = [os.path.abspath(path) for path in paths]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        raise ConfigError(f"{twice[0]}: is named twice; name each run once")
    opened = [_open(path, ranks, which) for path in paths]
    return _labelled([replace(run, name=name) for run, name in zip(opened, _names(paths), strict=True)])


def _open(path: Path, ranks: Ranks, which: str) -> AnalysedRun:
    folder = RunFolder(path)
    config = folder.read_config()
    try:
        manifest = read_manifest(config.data.log)
    except DataError as error:
        raise DataError(f"{error.problem} ({path} was trained on it)", file=error.file) from None
    found = checkpoint.find_to_use(folder.checkpoints, which)
    assert found.path is not None
    for line in found.lines:
        print(line, flush=True)
    groups, tensors = resolve_groups(config, manifest), TensorReader(found.path)
    check_tables(found.path, groups, tensors)
    return AnalysedRun(
        name=path.name,
        label=path.name,
        seed=config.train.seed,
        folder=folder,
        config=config,
        manifest=manifest,
        step=int(found.state["step"]),
        checkpoint=found.path,
        tensors=tensors,
        groups=groups,
        ranks=ranks,
        id_maps=frozen_ids(found.path, config.id_rules),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _labelled(runs: Sequence[AnalysedRun]) -> tuple[AnalysedRun, ...]:
    """The runs with a label for each config: what the names of its runs begin with, but for the seed."""
    by_config: dict[str, list[str]] = {}
    for run in runs:
        by_config.setdefault(_config_of(run), []).append(run.name)
    labels = {config: _label(names) for config, names in by_config.items()}
    taken = [*labels.values()]
    for config, names in by_config.items():
        if taken.count(labels[config]) > 1:
            labels[config] = names[0]
    return tuple(replace(run, label=labels[_config_of(run)]) for run in runs)


def _config_of(run: AnalysedRun) -> str:
    """A run's config without its seed."""
    tree = run.config.model_dump(mode="json")
    tree["train"].pop("seed")
    return json.dumps(tree, sort_keys=True)


def _label(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda signs: len(set(signs)) == 1, zip(*names, strict=False))
    common = "".join(signs[0] for signs in alike)
    if any(name[len(common) :][:1].isdigit() for name in names):
        # Seeds 17 and 18 have a digit in common, which says nothing of the config.
        common = common.rstrip("0123456789")
    common = common.rstrip("-_./ ")
    return common.removesuffix("seed").rstrip("-_./ ") or names[0]
