"""States of a batch's requests: found, extended or made, and as the model takes them.

Whether a state was found, extended or made shows in no bit of the scores: every row of a state depends on
its behavior and its place alone, and all that follows is the same. Vectors of behaviors are sums of rows of
tables, each by itself; all else is made a block at a time (see `state`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from embeddings.lookup.jagged import select_bags
from trainer.data.batch import RequestBatch
from trainer.model.branch import Branch
from trainer.model.frame import TwoStageModel
from trainer.model.known import KnownBehaviors
from trainer.serving.request import Needs, Request
from trainer.serving.user_state.cache import Outcome, StateCache
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.user_state.state import BLOCK, LINE, Stretch, UserState, block_of
from trainer.snapshot import Snapshot

_GROUP, _BRANCH = "group/", "branch/"
Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What states of a model hold.

    Attributes:
        groups: looked up for behaviors; kept: those whose vectors stay.
        raw: branch -> the group whose vectors are its attention vectors as they are.
        known: groups of the representation that are among `kept`; selects: whether there are others.
    """

    groups: tuple[str, ...]
    kept: tuple[str, ...]
    raw: Mapping[str, str]
    known: tuple[str, ...]
    selects: bool

    @staticmethod
    def of(model: TwoStageModel, representation: bool) -> Plan:
        branches = model.branches.named()
        raw = {
            name: branch.settings.roles.attention_behavior
            for name, branch in branches.items()
            if branch.settings.attend != () and not branch.columns
        }
        of_pooling = list(dict.fromkeys(b.settings.roles.representation_behavior for b in branches.values()))
        kept = list(dict.fromkeys([*raw.values(), *(of_pooling if representation else [])]))
        asked = [group for branch in branches.values() for group in branch.behavior_groups]
        known = tuple(group for group in of_pooling if group in kept)
        groups = tuple(dict.fromkeys([*asked, *kept]))
        return Plan(groups, tuple(kept), raw, known, len(known) < len(of_pooling))


@dataclass(frozen=True)
class _Part:
    """The behaviors of a request that the model reads.

    Attributes:
        stretch: of them; begin: the first of them among the batch's behaviors; user: of the request.
    """

    stretch: Stretch
    begin: int
    user: int

    def bags(self, first: int) -> Tensor:
        """Bags of the batch of the behaviors from place `first` on."""
        return torch.arange(self.begin + first - self.stretch.first, self.begin + self.stretch.size)


class StateMaker:
    """Makes states for the requests of one snapshot, and keeps them. Calls must not overlap.

    Args:
        snapshot, needs: of the scorer.
        settings: their `bytes` are not 0.
        snapshot_digest: of the manifest; store: where states are shared with other processes.

    Attributes:
        cache: the states that are kept.
        outcomes: of the requests of the newest call, by their places; of those without a state, none.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        needs: Needs,
        settings: UserStateSettings,
        snapshot_digest: str,
        store: SecondLevel | None = None,
    ) -> None:
        self.model, self.needs, self.settings = snapshot.model, needs, settings
        self._files = snapshot.files
        self.plan = Plan.of(snapshot.model, settings.representation)
        self.cache, self.store = StateCache(settings.bytes), store
        self.outcomes: dict[int, Outcome] = {}
        # A data path that searches, or clusters, leaves other behaviors in every batch.
        data = snapshot.manifest.config.data
        self.off = bool(data.search.levels) or data.clusters or not self.plan.groups
        matters = [snapshot_digest, settings.representation, BLOCK, torch.__version__]
        matters += [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
        self._digest = hashlib.sha256(json.dumps(matters).encode()).digest()
        self._row = {} if self.off else self._one_row()

    def known_for(
        self, requests: Sequence[Request]
    ) -> Callable[[RequestBatch], KnownBehaviors | None] | None:
        """What says what is known of the behaviors of these requests' batch; None: of none of them."""
        self.outcomes = {}
        if self.off or max(request.history.time.size for request in requests) < self.settings.least:
            return None
        return partial(self.known, requests)

    def known(self, requests: Sequence[Request], batch: RequestBatch) -> KnownBehaviors | None:
        """What is known of a batch's behaviors now; None where no request has a state.

        Args:
            requests: those of the batch, in its order.
        """
        parts = list(self._parts(requests, batch))
        large = [place for place, part in enumerate(parts) if part.stretch.size >= self.settings.least]
        if not large:
            return None
        found: dict[int, Rows] = {}
        # Once for each request of the user with most: what one makes, the next one finds.
        while large:
            turn: dict[bytes, int] = {}
            for place in large:
                turn.setdefault(self._key(parts[place]), place)
            found |= self._turn({place: key for key, place in turn.items()}, parts, batch)
            large = [place for place in large if place not in found]
        small = [place for place, part in enumerate(parts) if place not in found and part.stretch.size]
        for place, vectors in self._looked_up(
            {p: parts[p].stretch.first for p in small}, parts, batch
        ).items():
            rest = parts[place].stretch.first % LINE
            own = {name: rows[rest:] for name, rows in vectors.items()}
            found[place] = self._kept(own) | self._derived(own)
        return self._side_by_side([found[place] for place in sorted(found)])

    def _parts(self, requests: Sequence[Request], batch: RequestBatch) -> Iterator[_Part]:
        sizes = batch.host_sizes
        for request, begin, count in zip(requests, sizes.starts, sizes.windows, strict=True):
            end = int(np.searchsorted(request.history.time, request.time - self.needs.delay))
            stretch = Stretch.of(request.history, end - count, end, request.skipped)
            yield _Part(stretch, begin, request.user_id)

    def _key(self, part: _Part) -> bytes:
        user = f"user {part.user}".encode() if part.user else part.stretch.digest()
        return hashlib.sha256(self._digest + user).digest()

    def _turn(
        self, keys: Mapping[int, bytes], parts: Sequence[_Part], batch: RequestBatch
    ) -> dict[int, Rows]:
        """States of some requests of different users: what they have of each one's behaviors.

        Args:
            keys: place of a request -> key.
        """
        states: dict[int, UserState] = {}
        olds: dict[int, UserState | None] = {}
        for place, key in keys.items():
            wanted, old = parts[place].stretch, self.cache.get(key)
            if old is None and self.store is not None:
                old = self._shared(key, self.store)
            outcome: Outcome = "miss"
            if old is not None and old.has(wanted):
                outcome, states[place] = "hit", old
            elif old is not None and old.precedes(wanted):
                outcome, olds[place] = "extended", old
            else:
                outcome, olds[place] = "miss" if old is None else "stale", None
            self.cache.count(outcome)
            self.outcomes[place] = outcome
        first = {
            place: parts[place].stretch.first if old is None else old.known.last
            for place, old in olds.items()
        }
        for place, vectors in self._looked_up(first, parts, batch).items():
            made = self._made(keys[place], parts[place].stretch, olds[place], vectors)
            states[place] = made
            # Rows of a table that was overwritten must not outlive it.
            if all(bool(rows.isfinite().all()) for rows in vectors.values()):
                self.cache.put(made)
                if self.store is not None:
                    self.store.put(made, self._is_of_the_version)
        return {place: state.rows_of(parts[place].stretch) for place, state in states.items()}

    def _is_of_the_version(self) -> bool:
        """Whether rows are still those that the key of a state stands for."""
        return not self._files.overwritten()

    def _shared(self, key: bytes, store: SecondLevel) -> UserState | None:
        """What another process made, as far as it is what this one would make."""
        found = store.get(key)
        if found is None or _shapes(found.rows) != _shapes(self._row):
            return None
        # In memory of its own, which begins at a line.
        found = replace(found, rows={name: part.clone() for name, part in found.rows.items()}, writable=True)
        self.cache.put(found)
        return found

    def _looked_up(
        self, first: Mapping[int, int], parts: Sequence[_Part], batch: RequestBatch
    ) -> dict[int, Rows]:
        """Group -> vectors of the behaviors of some requests, from the beginning of a line on.

        Args:
            first: place of a request -> the first behavior that is asked for.
        """
        if not first:
            return {}
        # Rows of a state begin at a line: some of the first behavior stand before it.
        bags_of = {place: parts[place].bags(begin) for place, begin in first.items()}
        for place, begin in first.items():
            if begin % LINE:
                some = bags_of[place]
                bags_of[place] = torch.cat([some[:1].expand(begin % LINE), some])
        bags = select_bags(batch.features, torch.cat(list(bags_of.values())), batch.host_sizes.one_id)
        looked_up = self.model.lookups({name: self.model.look_up(name, bags) for name in self.plan.groups})
        sizes = [part.numel() for part in bags_of.values()]
        cut = {name: vectors.split(sizes) for name, vectors in looked_up.items()}
        if len(sizes) > 1:
            # Each in memory of its own: a state would keep all of it.
            cut = {name: tuple(part.clone() for part in parts_) for name, parts_ in cut.items()}
        return {
            place: {name: vectors[at] for name, vectors in cut.items()} for at, place in enumerate(bags_of)
        }

    def _kept(self, vectors: Rows) -> dict[str, Tensor]:
        return {f"{_GROUP}{name}": vectors[name] for name in self.plan.kept}

    def _derived(self, vectors: Rows) -> dict[str, Tensor]:
        """What branches make of vectors, but for attention vectors that are kept as they are."""
        found = {}
        for name, branch in self._branches():
            for what, rows in branch.of_behaviors(vectors).items():
                if what != "raw" or name not in self.plan.raw:
                    found[f"{_BRANCH}{name}/{what}"] = rows
        return found

    def _branches(self) -> Iterator[tuple[str, Branch]]:
        yield from self.model.branches.named().items()

    def _made(self, key: bytes, wanted: Stretch, old: UserState | None, vectors: Rows) -> UserState:
        """The state of `wanted`: a new one, or an old one and the behaviors behind it.

        Args:
            vectors: of the behaviors that the old one lacks.
        """
        first, last = wanted.first if old is None else old.known.last, wanted.last
        state = self._room(key, wanted, old, vectors)
        vectors = {name: rows[first % LINE :] for name, rows in vectors.items()}
        for name, rows in self._kept(vectors).items() if old is not None else ():
            state.part(name, first, last).copy_(rows)
        for begin in range(block_of(first), last, BLOCK) if len(state.rows) > len(self.plan.kept) else ():
            own = slice(max(begin, first), min(begin + BLOCK, last))
            # What other places of a block hold changes no row of a product.
            block = {name: rows.new_zeros(BLOCK, *rows.shape[1:]) for name, rows in vectors.items()}
            for name, rows in vectors.items():
                block[name][own.start - begin : own.stop - begin] = rows[own.start - first : own.stop - first]
            for name, rows in self._derived(block).items():
                state.part(name, own.start, own.stop).copy_(rows[own.start - begin : own.stop - begin])
        return state

    def _room(self, key: bytes, wanted: Stretch, old: UserState | None, vectors: Rows) -> UserState:
        """A state of `wanted` whose rows are those of the old one, as far as it goes.

        Without one, vectors that are kept are there already, where they were looked up.
        """
        if old is not None and old.writable and wanted.last <= old.origin + old.places:
            # Nobody reads the rows behind the last, so that those who have the old state may go on.
            return replace(old, known=old.known.join(wanted.cut(old.known.last, wanted.last)))
        origin = wanted.first - wanted.first % LINE
        # After the first time, room for what comes next, so that not every behavior makes a copy.
        places = wanted.last - origin + (0 if old is None else BLOCK)
        rows = self._kept(vectors) if old is None else {}
        for name, row in self._row.items():
            if name not in rows:
                rows[name] = row.new_empty(places, *row.shape[1:])
        state = UserState(key, wanted.copy(), origin, rows)
        if old is not None:
            for name in rows:
                state.part(name, wanted.first, old.known.last).copy_(
                    old.part(name, wanted.first, old.known.last)
                )
        return state

    def _one_row(self) -> dict[str, Tensor]:
        """A row of each tensor of a state."""
        groups = self.model.lookups.groups
        vectors = {name: torch.zeros(1, groups[name].width) for name in self.plan.groups}
        return self._kept(vectors) | self._derived(vectors)

    def _side_by_side(self, found: Sequence[Rows]) -> KnownBehaviors:
        """What is known of all behaviors of a batch, from what is known of those of each request."""
        rows = {name: _joined([part[name] for part in found]) for name in self._row}
        of_branch: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self._branches()}
        for name, group in self.plan.raw.items():
            of_branch[name]["raw"] = rows[f"{_GROUP}{group}"]
        for name, part in rows.items():
            if name.startswith(_BRANCH):
                branch, _, what = name.removeprefix(_BRANCH).rpartition("/")
                of_branch[branch][what] = part
        known = {name: rows[f"{_GROUP}{name}"] for name in self.plan.known}
        return KnownBehaviors(known, of_branch, self.plan.selects)


def _shapes(rows: Rows) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (part.shape[1:], part.dtype) for name, part in rows.items()}


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; the only one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
