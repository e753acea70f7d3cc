"""The version of a snapshot that is served, and how a newer one takes its place while requests go on."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path

from torch import nn

from embeddings.errors import SnapshotError, TandemError, UnavailableError
from embeddings.lookup.hot_rows import HotCounts, HotRows, keep_hot_rows, total
from embeddings.lookup.plain import PlainBagCollection
from trainer.log.known_values import drop_unused
from trainer.serving.histories import HistoryStore
from trainer.serving.latest import Look, Outcome, Sealed, compare
from trainer.serving.scorer import Scorer
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.vocabulary import vocabularies_of
from trainer.snapshot import exported_at, load_fetched, resolve, shown


class Versions:
    """The version that is served: loads, checks and hands out its scorer.

    `reload` may be called from any thread.

    Args:
        root: a version's folder, which is then served for good, or the folder of versions.
        histories: their ids must be of the snapshot's vocabulary.
        vocabulary: a log whose values may stand for ids, where a snapshot has none with it.
        cache: where versions of a snapshot in an object store are fetched to, and vocabularies kept that are
            too large for memory; None: the user's caches.
        hot_rows: bytes for rows that are asked for most, see `embeddings.lookup.hot_rows`; 0 = none are kept.
        user_states: what scorers keep of users between their requests; a new version begins without any.
        store: what other processes share of it.
        reloaded: told "switched", "unchanged", "refused" or "failed" after every attempt.

    Attributes:
        scorer: the one in use. Whoever took it may go on with it; its tables live as long as it does.
        refused: the newest version that was refused and why, or None.
        looks: how often a look at LATEST found what, see `trainer.serving.latest`.
        latest_problem: why the version that LATEST names is not the one that is served, as of the newest
            look; None where it is.
        exported_at, served_since: when the version in use was exported, and since when it is served; seconds
            since 1970.

    Raises:
        SnapshotError: the first version cannot be loaded or fails its self-check.
        UnavailableError: it, or a vocabulary, cannot be fetched or kept now.
        DataError: the histories or values are of another vocabulary.
        ConfigError: the histories lack the model's clusters.
    """

    def __init__(
        self,
        root: Path,
        histories: HistoryStore | None = None,
        reloaded: Callable[[str], None] = lambda outcome: None,
        vocabulary: Path | None = None,
        cache: Path | None = None,
        hot_rows: int = 0,
        user_states: UserStateSettings | None = None,
        store: SecondLevel | None = None,
    ) -> None:
        self._user_states, self._store = user_states, store
        self._cache, self._hot_bytes = cache, hot_rows
        self._hot_rows: dict[str, HotRows] = {}
        self.root, self.histories, self._reloaded = root, histories, reloaded
        self._vocabulary = vocabulary
        self.refused: tuple[str, str] | None = None
        self.looks: Counter[Outcome] = Counter()
        self.latest_problem: str | None = None
        self._lock = threading.Lock()
        self._refused: Sealed | None = None
        # The scorer that is not to be trusted, and its files when it was last refused for that.
        self._doubted: Callable[[], Scorer | None] = lambda: None
        self._tried: Hashable = None
        found = Sealed.at(resolve(root))
        self._serve(found, *self._load(found.path))

    def shown(self) -> str:
        """How to call the version in use: where it lies, and where it was fetched to."""
        return shown(self.root, self.scorer.snapshot.path)

    @property
    def digest(self) -> str:
        """Of the manifest of the version in use: two versions may have one name, but not one digest."""
        return self._served.digest

    @property
    def hot_counts(self) -> HotCounts:
        """What was looked up in tables with hot rows, since this version is served."""
        return total(self._hot_rows)

    def doubt(self, scorer: Scorer) -> None:
        """It answered with what is no number, or its files were written over.

        At the next look that finds its files good, and at every `reload` that is asked for, the version is
        loaded anew and checked like any other; what was kept of users goes with the old scorer.
        """
        if self._doubted() is not scorer:
            self._doubted, self._tried = weakref.ref(scorer), None

    def newer(self) -> Path | None:
        """The version that LATEST names, unless it is served or was refused; the served one, where it is
        `mended`.

        Raises:
            SnapshotError: LATEST is gone, or names no version, an older one, or another one than the one of
                this name that is served; or a file of the served one was written over where it lies.
            UnavailableError: the store or the disk does not answer.
        """
        found = self._look()
        return found.path if found is not None else None

    def reload(self, retry: bool = True) -> bool:
        """Switch to the newest version; False if it is served already. Blocks; requests go on meanwhile.

        Args:
            retry: take whatever version LATEST names, also one that was refused before or is older.

        Raises:
            UnavailableError: a store or a disk fails now. TandemError: the new version was refused. The old
                one stays.
        """
        with self._lock:
            found = Sealed.at(resolve(self.root)) if retry else self._look(again=True)
            if found is None or (found == self._served and retry and not self._wants_anew()):
                self._reloaded("unchanged")
                return False
            files = self.scorer.snapshot.files.state()
            try:
                # The name changes last: until then every request gets the old scorer.
                loaded = self._load(found.path)
            except Exception as error:
                if isinstance(error, TandemError) and not isinstance(error, UnavailableError):
                    self._refused, self.refused = found, (found.path.name, str(error))
                    self._tried = files
                    self.latest_problem = str(error)
                    self._reloaded("refused")
                else:
                    # No fault of the version, as far as anybody knows: it is tried again.
                    self._reloaded("failed")
                raise
            self._serve(found, *loaded)
            self._reloaded("switched")
            return True

    def _serve(self, found: Sealed, scorer: Scorer, hot_rows: dict[str, HotRows]) -> None:
        self.exported_at, self.served_since = exported_at(found.path, scorer.snapshot.manifest), time.time()
        self._refused = self.refused = self.latest_problem = None
        self._served, self.scorer, self._hot_rows = found, scorer, hot_rows

    def _look(self, again: bool = False) -> Sealed | None:
        """What may be taken of what LATEST names; every look is counted.

        Args:
            again: `newer` has found and counted what is to be taken now.
        """
        look = self._found()
        if not (again and look.outcome in ("newer", "mended")):
            self.looks[look.outcome] += 1
        if look.problem is not None:
            self.latest_problem = str(look.problem)
            raise look.problem
        self.latest_problem = self.refused[1] if look.outcome == "refused" and self.refused else None
        return look.version if look.outcome in ("newer", "mended") else None

    def _found(self) -> Look:
        try:
            look = compare(Sealed.at(resolve(self.root)), self._served, self._refused, self.root)
        except TandemError as error:
            look = Look("unreachable" if isinstance(error, UnavailableError) else "broken", None, error)
        # A newer version mends it.
        changed = "" if look.outcome == "newer" else self.scorer.snapshot.overwritten()
        if changed:
            self.doubt(self.scorer)
            return Look("overwritten", look.version, SnapshotError(self.scorer.snapshot.path, changed))
        if look.outcome == "served" and self._is_doubted():
            if self._tried != self.scorer.snapshot.files.state():
                return Look("mended", look.version)
            return Look("refused", look.version)
        return look

    def _is_doubted(self) -> bool:
        return self._doubted() is self.scorer

    def _wants_anew(self) -> bool:
        """Whether the version that is served is to be loaded once more, where that is asked for."""
        return self._is_doubted() or bool(self.scorer.snapshot.overwritten())

    def _load(self, path: Path) -> tuple[Scorer, dict[str, HotRows]]:
        snapshot = load_fetched(path, self._cache)
        hot_rows = keep_hot_rows(map(_plain, snapshot.model.collections.values()), self._hot_bytes)
        for name, table in hot_rows.items():
            if name in self._hot_rows:
                # What was asked for until now is what will be.
                table.keep(self._hot_rows[name].noted())
        snapshot.self_check()
        if self.histories is not None:
            known = self.histories.manifest
            snapshot.check_vocabularies({**known.features, **known.context}, self.histories.log)
        chunk = self.histories.chunk if self.histories else 0
        scorer = Scorer(snapshot, chunk, user_states=self._user_states, store=self._store)
        scorer.vocabularies = vocabularies_of(snapshot, self._vocabulary, self._cache)
        users = self.histories.users if self.histories is not None else None
        drop_unused(each.folder for each in (*scorer.vocabularies.values(), users) if each is not None)
        # Once more with the searches that serve, which also brings what they need into memory.
        snapshot.check_own(snapshot.score(snapshot.recorded.batch))
        return scorer, hot_rows


def _plain(collection: nn.Module) -> PlainBagCollection:
    assert isinstance(collection, PlainBagCollection)
    return collection
