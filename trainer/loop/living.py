"""Features whose ids come and go, while a model trains: each step's raw ids become rows, in step order.

Maps change when a step is read. A pipeline reads some steps before it has trained those before them, and so
the maps are then ahead of the weights. What a save or a validation sees are maps as of the newest trained
step: the changes of the others are taken back for that long. Steps that a pipeline has read and drops are
taken back for good, for they will be read again.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch.distributed as dist

from embeddings.agreement import from_every_rank
from embeddings.ids.bucket_map import Counts, Int64s
from embeddings.ids.stage import IdStage, Taken
from trainer.checkpoint.id_files import IdFiles, read_stage
from trainer.data.batch import RequestBatch, pinning
from trainer.data.living_ids import SeenIds, newest_request, rules_for, seen_ids, with_rows
from trainer.data.reader import Step
from trainer.log.schema import FeatureInfo
from trainer.ranks.process_group import Ranks, sum_counts
from trainer.run_config import Config

_MB, _DAY = 1e6, 86_400
_SHOWN = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True)
class _Untrained:
    """A step that was read: what its maps have become, and what became of its ids on this rank."""

    taken: Taken
    counts: Mapping[str, Counts]


class LivingIds:
    """The id stage of a training, on one rank.

    Args:
        stage: its maps; ahead: steps are read before others are trained, so that changes may have to be taken
            back.
        prepare: changes every batch last; None: nothing does.

    Attributes:
        frozen: no table is trained: ids neither get rows nor lose them.
    """

    def __init__(
        self, stage: IdStage, ahead: bool, prepare: Callable[[RequestBatch], RequestBatch] | None = None
    ) -> None:
        self.stage, self.frozen = stage, False
        self._ahead, self._prepare = ahead, prepare
        self._untrained: deque[_Untrained] = deque()
        self._counts: dict[str, Counts] = {}
        self._restart()

    @staticmethod
    def of(config: Config, ranks: Ranks, ahead: bool, features: Mapping[str, FeatureInfo]) -> LivingIds:
        """Those of a run; collective.

        Args:
            features: of behaviors and candidates, as the log has them.
        """
        group = None
        if ranks.world_size > 1:
            # Of its own, so that its exchanges cannot mix with those of the tables.
            timeout = datetime.timedelta(seconds=config.train.timeout_s)
            group = dist.new_group(backend="gloo", timeout=timeout)
        stage = IdStage(rules_for(config.id_rules, features), ranks.rank, ranks.world_size, group)
        return LivingIds(stage, ahead, pinning(ranks.device))

    @contextmanager
    def steps(self, steps: Iterable[Step]) -> Iterator[Iterator[Step]]:
        """The same steps with rows in the place of ids; maps change with each. Collective, in their order.

        At the end of the block, what those steps have changed that are not trained is taken back.
        """
        try:
            yield (self._looked_up(step) if self.frozen else self._taken(step) for step in steps)
        finally:
            # Where nothing is read ahead, a step that is not trained has failed, and the run with it.
            while self._untrained and self._ahead:
                self._untrained.pop().taken.swap()

    def trained(self) -> None:
        """The oldest step that was read is trained by now."""
        if self.frozen:
            return
        done = self._untrained.popleft()
        for name, counts in done.counts.items():
            for key in _SHOWN:
                setattr(self._counts[name], key, getattr(self._counts[name], key) + getattr(counts, key))

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """A block in which the maps are those of the newest trained step."""
        for each in reversed(self._untrained):
            each.taken.swap()
        try:
            yield
        finally:
            for each in self._untrained:
                each.taken.swap()

    def looked_up(self, steps: Iterable[Step]) -> Generator[Step, None, None]:
        """The same steps with rows in the place of ids; no map changes. Collective, in their order."""
        return (self._looked_up(step) for step in steps)

    def files(self) -> IdFiles:
        """What a checkpoint keeps of the maps, as of the newest trained step."""
        with self.as_trained():
            return IdFiles.of(self.stage)

    def load(self, path: Path) -> list[str]:
        """Take up the maps of a verified checkpoint; -> lines that say what of them begins anew. Collective.

        Raises:
            CheckpointError: see `read_stage`; on all ranks.
        """
        return from_every_rank(lambda: read_stage(path, self.stage), slow=True)[0]

    def report(self) -> dict[str, dict[str, int]]:
        """What became of each feature's ids since the last call, over all ranks; collective.

        Each id of a step counts once. `live` is the number of ids that have a row.
        """
        with self.as_trained():
            live = [each.live for each in self.stage.maps.values()]
        mine = [getattr(self._counts[name], key) for name in self.stage.maps for key in _SHOWN]
        sums = iter(sum_counts(mine + live))
        found = {name: {key: next(sums) for key in _SHOWN} for name in self.stage.maps}
        for entry in found.values():
            entry["live"] = next(sums)
        self._restart()
        return found

    def _restart(self) -> None:
        self._counts = {name: Counts() for name in self.stage.maps}

    def _taken(self, step: Step) -> Step:
        seen = seen_ids(step.batch, self.stage.rules, step.counted)
        sightings = {name: each.sightings for name, each in seen.items()}
        taken = self.stage.take(sightings, newest_request(step.batch), self._ahead)
        counts = {name: each.counts for name, each in self.stage.maps.items()}
        for each in self.stage.maps.values():
            each.counts = Counts()
        self._untrained.append(_Untrained(taken, counts))
        batch = with_rows(step.batch, self._placed(taken.rows, seen))
        new_rows = {name: rows for name, rows in taken.new_rows.items() if rows.size}
        return replace(step, batch=self._prepared(batch), new_rows=new_rows)

    def _looked_up(self, step: Step) -> Step:
        seen = seen_ids(step.batch, self.stage.rules)
        rows = self.stage.look_up({name: each.sightings.ids for name, each in seen.items()})
        return replace(step, batch=self._prepared(with_rows(step.batch, self._placed(rows, seen))))

    def _placed(self, rows: Mapping[str, Int64s], seen: Mapping[str, SeenIds]) -> dict[str, Int64s]:
        """What each map gave for the distinct ids of its feature, for each id of the batch."""
        rules = self.stage.rules
        return {name: each[seen[rules[name].within or name].place] for name, each in rows.items()}

    def _prepared(self, batch: RequestBatch) -> RequestBatch:
        return batch if self._prepare is None else self._prepare(batch)


def lines_of(config: Config, world_size: int, windows: bool = False) -> list[str]:
    """What a start says of features whose ids come and go: a line for each map, and what is odd.

    Args:
        windows: what is read are windows of a stream, which are in order whatever the order inside of them.
    """
    found = []
    for name, rules in config.id_rules.items():
        size = f"{rules.map_bytes / world_size / _MB:,.1f} MB of host memory a rank"
        words = [f"up to {rules.rows - rules.shared_rows:,} have rows, others share {rules.shared_rows:,}"]
        words += [f"admission {' '.join(rules.admission_state)}, eviction {rules.eviction}"]
        words += [f"none older than {rules.ttl / _DAY:g} days"] if rules.ttl else []
        found.append(f"ids of {name}: {'; '.join([*words, size])}")
    shuffled = [name for name, each in config.ids.items() if each.ttl_days]
    if shuffled and config.data.order == "shuffled" and not windows:
        found.append(
            f'ids.{shuffled[0]}.ttl_days goes by the newest request, and data.order = "shuffled" reads new '
            'ones first and old ones last; ingest with files.order = "time" and set data.order = "stored", '
            "or cut the log into windows for `tandemrec online`"
        )
    return found
