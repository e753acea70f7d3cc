"""Branches of a phase that start from the same weights and become one again (ForkMerge; Jiang et al. 2023).

A round: each branch trains the same number of steps from the weights at the fork, one after the other, and
then the mean of their weights that the target's validation likes best is what the next round starts from.
Optimizer states are averaged by the same shares. No table is ever copied as a whole: of tables only rows are
kept that some branch looks up, as they were before (`embeddings.lookup.before_change`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.agreement import from_every_rank
from embeddings.errors import ConfigError, DataError
from embeddings.lookup.before_change import (
    Rows,
    RowsBeforeChange,
    RowsOfShards,
    bytes_of,
    combined,
    combined_rows,
)
from embeddings.lookup.touched import ShardKey, TouchedRows
from trainer.checkpoint.delta import row_parts, rows_of_tables
from trainer.checkpoint.fork_files import BASE, ForkFiles, Moment, copied, dense_tensors, read_moments
from trainer.checkpoint.save_load import Beside
from trainer.config.phases import PhaseConfig
from trainer.data.cursor import Cursor
from trainer.loop.early_stopping import LOWER_IS_BETTER
from trainer.loop.phases import Phase, branches_of
from trainer.loop.position import Position
from trainer.loop.shares import Choice, Shares, search
from trainer.quality.domains import SplitMetrics

# What the names of tables, and of the states of their optimizers, begin with in a checkpoint.
_OF_TABLES = ("model.collections.", "optim.state.fused.")


@dataclass
class Round:
    """Where a phase with branches stands: what a checkpoint keeps of that besides tensors.

    Attributes:
        names: of the branches in the config; going: those that still go on, by their places there.
        number: of the present round, from 1; place: in `going`, of the branch that trains now.
        steps: that each branch trains in this round; 0 before the first one has ended.
        step, candidates: of the run, where the present branch began.
        fork_steps, fork_candidates: of the phase, where this round began.
        first_candidates: what the first branch has trained in this round.
        cursors: where each branch of the config goes on reading.
        history: of each merge, the step and the share of each branch by its name.
    """

    names: list[str]
    going: list[int]
    number: int = 0
    place: int = 0
    steps: int = 0
    step: int = 0
    candidates: int = 0
    fork_steps: int = 0
    fork_candidates: int = 0
    first_candidates: int = 0
    cursors: list[Cursor] = field(default_factory=list)
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def present(self) -> int:
        """The place in the config of the branch that trains now."""
        return self.going[self.place]

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Round:
        """Of a checkpoint."""
        cursors = [Cursor.of_state(cursor) for cursor in state["cursors"]]
        history = [(int(step), dict(shares)) for step, shares in state["history"]]
        return Round(**{**state, "cursors": cursors, "history": history})


@dataclass(frozen=True)
class Merge:
    """What became of a round.

    Attributes:
        number: of the round; names: of the branches that were merged; choice: by their order.
        metric: its name; metrics: of the merged weights; kept_bytes: that this rank held of rows, at most.
        left: names of branches that do not go on.
    """

    number: int
    names: list[str]
    choice: Choice
    metric: str
    metrics: SplitMetrics
    kept_bytes: int
    left: list[str]

    @property
    def shares(self) -> dict[str, float]:
        return self._by_name(self.choice.shares)

    def entry(self) -> dict[str, Any]:
        """As metrics.jsonl has it."""
        tried = [
            {"lambda": self._by_name(shares), self.metric: self._value(value)}
            for shares, value in self.choice.tried.items()
        ]
        chosen = self._value(self.choice.tried[self.choice.shares])
        size = {"kept_mb": round(self.kept_bytes / 1e6, 3)}
        return {"round": self.number, "lambda": self.shares, self.metric: chosen, "tried": tried, **size}

    def text(self, step: int) -> str:
        shares = ", ".join(f"{share:.2g} {name}" for name, share in self.shares.items())
        alone = ", ".join(
            f"{name} {self._value(self.choice.alone(place)):.4f}" for place, name in enumerate(self.names)
        )
        value = self._value(self.choice.tried[self.choice.shares])
        left = f"; {', '.join(self.left)} will not go on" if self.left else ""
        found = f"{shares}; {self.metric} {value:.4f} (alone: {alone})"
        return f"merge {self.number} after step {step:,}: {found}{left}"

    def _value(self, value: float) -> float:
        return -value if self.metric in LOWER_IS_BETTER else value

    def _by_name(self, shares: Shares) -> dict[str, float]:
        return {name: round(share, 9) for name, share in zip(self.names, shares, strict=True)}


class Fork:
    """The branches of a phase, trained one after the other.

    Args:
        phase: with branches; tensors: the state dict of model and optimizers as it is now, whose tensors are
            written to in place.
        keeper: of the model's rows; touched: told of rows that are restored or merged.
        measure: the model as it is, on the validation split; collective.
    """

    def __init__(
        self,
        phase: Phase,
        tensors: Callable[[], dict[str, Any]],
        keeper: RowsBeforeChange,
        touched: TouchedRows | None,
        measure: Callable[[], SplitMetrics],
    ) -> None:
        assert phase.settings.fork is not None
        self.phase, self.settings, self.branches = phase, phase.settings.fork, branches_of(phase)
        self._tensors, self._keeper, self._touched, self._measure = tensors, keeper, touched, measure
        self.names = [branch.name for branch in self.settings.branches]
        self._whole = self.settings.scope == "all"
        # All that is no row of a table at the fork, and the ends of branches in the order of `Round.going`.
        self._base: Mapping[str, Tensor] = {}
        self._ends: list[Moment] = []
        self.round = Round(self.names, [*range(len(self.names))])

    @property
    def branch(self) -> Phase:
        """The present one."""
        return self.branches[self.round.present]

    def of_branch(self) -> dict[str, Any]:
        """What lines of metrics say of it."""
        return {"round": self.round.number, "branch": self.names[self.round.present]}

    def begin(self, at: Position) -> None:
        """Enter the phase, with the weights as they are."""
        for branch in self.branches:
            other = branch.reads != self.phase.reads and at.cursor.blocks
            self.round.cursors.append(at.cursor.next_pass() if other else at.cursor)
        at.cursor = self.round.cursors[0]
        self._fork(at)

    def end(self) -> None:
        """Leave the phase."""
        self._keeper.end()

    def inside(self, at: Position) -> bool:
        """Whether a round has begun whose merge is still to come."""
        return self.round.place > 0 or at.step > self.round.step

    def left(self, at: Position) -> int:
        """Steps of the present branch at the most."""
        return (self.round.steps or self.settings.every) - (at.step - self.round.step)

    def over(self, at: Position, last: bool) -> bool:
        """Whether the present branch ends with the step just done; `last`: the last one of its pass."""
        # The first branch ends with the phase at the latest, the others where the first one did.
        limit = self.phase.train.max_steps
        ends = bool(limit and at.steps_done >= limit) or (last and at.passes_done(self.phase, 1))
        return self.left(at) == 0 or (self.round.place == 0 and ends)

    def turn(self, at: Position, last: bool) -> Merge | None:
        """Go on to the next branch, or merge them all and begin a new round; collective.

        Raises:
            DataError: the validation split cannot tell how to merge.
        """
        now = self.round
        now.cursors[now.present] = at.cursor.next_pass() if last else at.cursor
        if now.place == 0:
            now.steps, now.first_candidates = at.step - now.step, at.candidates - now.candidates
        rows = self._keeper.changed() if self._whole else {}
        self._ends.append(Moment(rows, copied(self._dense())))
        merge = None
        if now.place + 1 < len(now.going):
            now.place += 1
            self._put(self._keeper.before(), self._base)
            at.count_as(now.fork_steps, now.fork_candidates)
            now.step, now.candidates = at.step, at.candidates
        else:
            merge = self._merge(at.step)
            at.count_as(now.fork_steps + now.steps, now.fork_candidates + now.first_candidates)
            self._fork(at)
        at.cursor = now.cursors[now.present]
        return merge

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return asdict(self.round)

    def files(self, at: Position) -> list[Beside]:
        """What writes the tensors that a checkpoint keeps besides its own, if there are any."""
        if not self.inside(at):
            return []
        moments = {BASE: Moment(self._keeper.before(), self._base)}
        moments |= {str(place): end for place, end in enumerate(self._ends)}
        return [ForkFiles(moments, row_parts(self._tensors())).write]

    def resume(self, folder: Path, at: Position) -> None:
        """Go on from a verified checkpoint whose weights are loaded; `round` says where it stands.

        Raises:
            CheckpointError: what it keeps of the fork does not fit.
        """
        if not self.inside(at):
            self._base = copied(self._dense())
            self._keep()
            return
        names = [BASE, *map(str, range(self.round.place))]
        watched, parts = self._keeper.rows if self._whole else {}, row_parts(self._tensors())
        found: dict[str, Moment] = {}
        from_every_rank(lambda: found.update(read_moments(folder, names, parts, watched, self._dense())))
        self._base, self._ends = found[BASE].dense, [found[name] for name in names[1:]]
        self._keep(found[BASE].rows)

    def _fork(self, at: Position) -> None:
        """Begin a round with the weights as they are."""
        now = self.round
        now.number, now.place, now.steps = now.number + 1, 0, 0
        now.step, now.candidates = at.step, at.candidates
        now.fork_steps, now.fork_candidates = at.steps_done, at.candidates_done
        self._ends, self._base = [], copied(self._dense())
        self._keep()

    def _keep(self, rows: RowsOfShards | None = None) -> None:
        if self._whole:
            self._keeper.begin(rows)

    def _dense(self) -> dict[str, Tensor]:
        """All tensors that are merged as a whole, by their names in a checkpoint."""
        dense = dense_tensors(self._tensors())
        if self._whole:
            return dense
        # Of data-parallel tables, which are whole, too.
        return {name: tensor for name, tensor in dense.items() if not name.startswith(_OF_TABLES)}

    @torch.no_grad()
    def _put(self, rows: RowsOfShards, dense: Mapping[str, Tensor]) -> None:
        self._keeper.put(rows)
        if self._touched is not None:
            for key, each in rows.items():
                self._touched.add(key, each.ids)
        for name, tensor in self._dense().items():
            tensor.copy_(dense[name])

    def _merge(self, step: int) -> Merge:
        """Find the shares that the target's validation likes best, and take the mean by them."""
        now, base = self.round, self._keeper.before()
        measured: dict[Shares, SplitMetrics] = {}

        def mix(shares: Shares) -> None:
            rows = {key: self._mixed_rows(key, each, shares) for key, each in base.items()}
            self._put(rows, {name: self._mixed(name, shares) for name in self._base})

        def value_of(shares: Shares) -> float:
            mix(shares)
            measured[shares] = self._measure()
            return self._value(measured[shares])

        try:
            choice = search(value_of, len(now.going), self.settings.grid)
        except ValueError:
            of = "" if self.settings.domain is None else f" in domain {self.settings.domain}"
            raise DataError(
                f"{self.phase.key}.fork: validation has no {self.settings.metric} of the target task{of}, by "
                "which branches are merged; name another task or metric"
            ) from None
        mix(choice.shares)
        names = [self.names[place] for place in now.going]
        kept = bytes_of([base, *(end.rows for end in self._ends)])
        left = self._prune(choice) if now.number == 1 else []
        merge = Merge(now.number, names, choice, self.settings.metric, measured[choice.shares], kept, left)
        now.history.append((step, merge.shares))
        return merge

    def _mixed_rows(self, key: ShardKey, base: Rows, shares: Shares) -> Rows:
        none = Rows(base.ids[:0], tuple(part[:0] for part in base.parts))
        return combined_rows(base, [end.rows.get(key, none) for end in self._ends], shares)

    def _mixed(self, name: str, shares: Shares) -> Tensor:
        values = [end.dense[name] for end in self._ends]
        if not _counts(name, values[0]):
            return combined(values, shares)
        # A count has no mean: the largest of the branches that are taken.
        taken = [value for value, share in zip(values, shares, strict=True) if share]
        return torch.stack(taken).amax(0)

    def _value(self, metrics: SplitMetrics) -> float:
        """What the merge is to make large; NaN where validation cannot tell."""
        settings = self.settings
        tasks = metrics.tasks if settings.domain is None else metrics.of_domain(settings.domain)
        if not tasks:
            return math.nan
        value = float(getattr(tasks[settings.task or next(iter(tasks))], settings.metric))
        return -value if settings.metric in LOWER_IS_BETTER else value

    def _prune(self, choice: Choice) -> list[str]:
        """Have the best branches go on, as many as asked for -> the names of the others."""
        now, keep = self.round, self.settings.keep or len(self.names)
        # The target's own always does; a value that there is not comes last, and equal ones in order.
        others = sorted(range(1, len(now.going)), key=lambda place: _last_if_none(choice.alone(place)))
        going = [0, *sorted(others[: keep - 1])]
        left = [self.names[now.going[place]] for place in range(len(now.going)) if place not in going]
        now.going = [now.going[place] for place in going]
        return left


def keeper_of(model: DistributedModelParallel, tensors: Mapping[str, Any]) -> RowsBeforeChange:
    """Of all rows of a model; `tensors`: its state dict and that of its optimizers."""
    return RowsBeforeChange(model, rows_of_tables(tensors))


def go_on(fork: Fork | None, state: Mapping[str, Any], where: str) -> None:
    """Have a fork stand where a checkpoint does; its tensors come with `Fork.resume`.

    Args:
        fork: of the present phase, if it has one; state: of the checkpoint; where: it, for the message.

    Raises:
        ConfigError: the phase had other branches, or its rounds were of another length and one is under way.
    """
    before = state.get("fork") or {}
    names = [*before.get("names", ())]
    if names != ([] if fork is None else fork.names):
        was = f"the branches {', '.join(names)}" if names else "no branches"
        raise ConfigError(
            f"phases.{state.get('phase', 0)}.fork: {where} stands in a phase with {was}; keep them as they "
            "were, or name another --out"
        )
    if fork is None:
        return
    fork.round = Round.of_state(before)
    if not fork.inside(Position(step=int(state["step"]))):
        return
    began, now = PhaseConfig.model_validate(state["config"]["phases"][fork.phase.place]), fork.phase.settings
    assert began.fork is not None and now.fork is not None
    lengths = {"steps": (began.steps, now.steps), "passes": (began.passes, now.passes)}
    lengths["fork.every"] = began.fork.every, now.fork.every
    for key, (former, present) in lengths.items():
        if former != present:
            raise ConfigError(
                f"{fork.phase.key}.{key} = {present}: {where} stands inside a round of branches that began "
                f"with {former}; set it back until their merge, or name another --out"
            )


def _last_if_none(value: float) -> float:
    return math.inf if math.isnan(value) else -value


def _counts(name: str, tensor: Tensor) -> bool:
    """Whether a tensor counts something, such as steps."""
    return not tensor.is_floating_point() or (name.startswith("optim.") and name.endswith(".step"))
