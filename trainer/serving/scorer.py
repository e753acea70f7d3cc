"""From requests to scores, without Parquet: the same blocks, batches and model as in training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from embeddings.errors import ConfigError
from trainer.config.sections import DataConfig
from trainer.config.tasks import named_tasks
from trainer.data.batch import RequestBatch
from trainer.data.domain import DomainColumn
from trainer.data.labels import TaskLabels
from trainer.data.row_group import Floats
from trainer.data.rows import Columns
from trainer.data.similarity.keys import Key
from trainer.data.similarity.similarity import similarities_of, vectors_used
from trainer.log.known_values import KnownValues
from trainer.log.schema import FeatureInfo
from trainer.model.branch import Branch, Reading
from trainer.model.ops.threads import torch_alone
from trainer.model.windows import Selection
from trainer.sealed_folder import MANIFEST
from trainer.serving.any_batch import PLACE, any_batch
from trainer.serving.checks import visible_behaviors
from trainer.serving.exploration import Exploration, Sureness, sureness
from trainer.serving.forward import Forward
from trainer.serving.plain_batch import PlainBatches
from trainer.serving.request import Needs, Request
from trainer.serving.user_state.maker import StateMaker
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.window_search import WindowSearch, per_window
from trainer.snapshot import Snapshot
from trainer.snapshot.manifest import InputFeature

MOST_EXPLAINED = 100
# Behaviors of a call: to look all of them up costs less than to find those that were kept.
_FEW = 512
Explorations = Sequence[Exploration | None]


@dataclass(frozen=True)
class Explanation:
    """Why a candidate has its score: the behaviors that a branch kept for it, heaviest first.

    Attributes:
        behaviors: their places in the request's history; weights: of each, in the branch's attention.
    """

    behaviors: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Answer:
    """What a request with c candidates gets.

    Attributes:
        probabilities: float32 [c, T].
        explanations: branch -> one for each of the c candidates; empty unless asked for.
        history_used: behaviors that the model could see.
        unknown: place -> raw values there that stand for no id.
        sureness: how sure the model is; None unless asked for.
        user_state: what was known of the user before; empty where no states are kept, or none of this user.
    """

    probabilities: Floats
    explanations: Mapping[str, list[Explanation]]
    history_used: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)
    sureness: Sureness | None = None
    user_state: str = ""


class Seconds(NamedTuple):
    """Where the time of one model call went: batch, look-ups and search; the rest of the model."""

    search: float
    ranking: float


class Scorer:
    """Scores requests with a snapshot. Calls must not overlap.

    Args:
        snapshot: its searches are replaced by ones that work request by request.
        chunk: behaviors of a chunk of clusters, for a model that searches clusters; 0 = not known.
        clock: seconds; of the wall, unless a measurement wants those of the processor.
        user_states: what is kept of users between their requests; None, or 0 bytes: nothing.
        store: what other processes share of it.

    Raises:
        ConfigError: the model searches clusters, and their chunk is not known.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        chunk: int = 0,
        clock: Callable[[], float] = time.perf_counter,
        user_states: UserStateSettings | None = None,
        store: SecondLevel | None = None,
    ) -> None:
        self.snapshot, self.needs, self.clock = snapshot, Needs.of(snapshot), clock
        manifest = snapshot.manifest
        self.data = manifest.config.data
        if self.data.clusters and not chunk:
            raise ConfigError(
                f"{snapshot.path}: its model searches clusters, which are made offline; give --histories a "
                "log by `tandemrec cluster`"
            )
        self.columns = Columns(
            features=_infos(self.needs.candidates.known, self.needs),
            labels=TaskLabels(named_tasks(manifest.config.tasks, manifest.tasks), ()),
            context=_infos(self.needs.context.known, self.needs),
            numeric=manifest.numeric,
            chunk=chunk if self.data.clusters else 0,
            domain=_domain_of(self.data.domain, self.needs),
            similarities=similarities_of(self.data, _keys_of(self.data, manifest.inputs), snapshot.vectors),
        )
        # `trainer.serving.versions` sets them: requests may hold raw values of these features.
        self.vocabularies: Mapping[str, KnownValues] = {}
        self.states: StateMaker | None = None
        if user_states is not None and user_states.bytes:
            self.states = StateMaker(snapshot, self.needs, user_states, _digest_of(snapshot), store)
        self._plain = PlainBatches(self.columns, self.data)
        self.branches: dict[str, Branch] = {}
        for name, branch in snapshot.model.branches.items():
            assert isinstance(branch, Branch)
            self.branches[name] = branch
            if branch.search is not None:
                branch.search = per_window(branch.search)
        snapshot.model.branches.few = _FEW
        # Torch's own threads share the products over whole histories of models that search nothing.
        self._searches = all(isinstance(each.search, WindowSearch) for each in self.branches.values())

    @property
    def version(self) -> str:
        """Name of the snapshot's version."""
        return self.snapshot.path.name

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.snapshot.manifest.tasks

    def batch(self, requests: Sequence[Request], places: bool = False) -> RequestBatch:
        """Requests side by side, as the reader lays them; with `places` under a key of their own."""
        if not places and (plain := self._plain.of(requests)) is not None:
            return plain
        return any_batch(requests, self.columns, self.data, places)

    def score(
        self, requests: Sequence[Request], explain: bool = False, explore: Explorations = ()
    ) -> tuple[list[Answer], Seconds]:
        """One model call for all requests; each gets what it would get alone, to 1e-6.

        `explore`: of each request, what is asked of how sure the model is; empty: nothing of any.

        The product of a matrix with more rows may round the last bit otherwise; nothing else differs.
        """
        started = self.clock()
        batch = self.batch(requests, places=explain)
        known = None if self.states is None else self.states.known_for(requests)
        model = Forward(self.snapshot.model, self.clock, known)
        with torch_alone() if self._searches else nullcontext():
            judged = self.snapshot.judge(batch, model) if any(explore) else None
            scores = self.snapshot.score(batch, model) if judged is None else judged.mean.sigmoid()
        ended = self.clock()
        explained = _explained(requests, batch, model.read) if explain else {}
        answers, begin, probabilities = [], 0, scores.numpy()
        outcomes = {} if self.states is None else self.states.outcomes
        for place, (request, asked) in enumerate(
            zip(requests, explore or [None] * len(requests), strict=True)
        ):
            own = slice(begin, begin + request.count)
            answers.append(
                Answer(
                    probabilities[own],
                    {name: explanations[own] for name, explanations in explained.items()},
                    visible_behaviors(request, self.needs),
                    request.unknown,
                    None if judged is None or asked is None else sureness(judged, own, request, asked),
                    outcomes.get(place, ""),
                )
            )
            begin = own.stop
        return answers, Seconds(model.searched - started, ended - model.searched)


def _digest_of(snapshot: Snapshot) -> str:
    """Of its manifest; of a model that was never exported, its path."""
    return snapshot.digest() if (snapshot.path / MANIFEST).is_file() else str(snapshot.path)


def _infos(names: Sequence[str], needs: Needs) -> dict[str, FeatureInfo]:
    ids = {name: FeatureInfo(rows=needs.rows.get(name, 1)) for name in names if name not in needs.encoders}
    numbers = {name: FeatureInfo(rows=1, encoder=encoder) for name, encoder in needs.encoders.items()}
    return {name: ids.get(name) or numbers[name] for name in names}


def _keys_of(data: DataConfig, inputs: Mapping[str, InputFeature]) -> dict[str, Key]:
    """What has the vectors of each name, in requests."""
    found = {}
    for vectors in vectors_used(data):
        name = data.vectors[vectors].key
        given = inputs.get(name)
        if given is None:
            found[vectors] = Key(name, "users", None)
        elif given.side == "context":
            found[vectors] = Key(name, "requests", FeatureInfo(rows=1))
        else:
            found[vectors] = Key(name, "items", FeatureInfo(rows=1, side=given.side))
    return found


def _domain_of(feature: str, needs: Needs) -> DomainColumn | None:
    """The domain of candidates, where requests carry it: so it is wherever the model reads it."""
    of_requests = feature in needs.context.known
    if not feature or feature not in (*needs.context.known, *needs.candidates.needed):
        return None
    return DomainColumn(feature, of_requests, needs.rows[feature])


def _explained(
    requests: Sequence[Request], batch: RequestBatch, read: Mapping[str, Reading]
) -> dict[str, list[Explanation]]:
    """Branch -> what it kept of each candidate, for branches that weigh what they keep."""
    skipped = np.repeat([r.skipped for r in requests], [r.count for r in requests]).tolist()
    return {
        name: _explanations(batch, skipped, each.behaviors.selection, each.weight_CHK)
        for name, each in read.items()
        if each.weight_CHK is not None
    }


def _explanations(
    batch: RequestBatch, skipped: Sequence[int], kept: Selection, weight_CHK: torch.Tensor
) -> list[Explanation]:
    """For each candidate, the heaviest of the behaviors it kept; with several heads, by their mean weight.

    Args:
        skipped: [C], behaviors that were sent before those that the candidate's request holds.
    """
    place = batch.features[PLACE].values()
    weight = weight_CHK.mean(1).masked_fill(~kept.mask, -torch.inf)
    best = weight.topk(min(MOST_EXPLAINED, weight.shape[1]), dim=1)
    explanations = []
    for before, index, values in zip(skipped, kept.index.gather(1, best.indices), best.values, strict=True):
        real = values > -torch.inf
        explanations.append(Explanation((place[index[real]] + before).tolist(), values[real].tolist()))
    return explanations
