"""The version of a snapshot that is served, and how a newer one takes its place while requests go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from embeddings.errors import TandemError, UnavailableError
from trainer.log.known_values import drop_unused
from trainer.serving.histories import HistoryStore
from trainer.serving.scorer import Scorer
from trainer.serving.vocabulary import vocabularies_of
from trainer.snapshot import load_fetched, resolve, shown


class Versions:
    """The version that is served: loads, checks and hands out its scorer.

    `reload` may be called from any thread.

    Args:
        root: a version's folder, which is then served for good, or the folder of versions.
        histories: their ids must be of the snapshot's vocabulary.
        vocabulary: a log whose values may stand for ids, where a snapshot has none with it.
        cache: where versions of a snapshot in an object store are fetched to, and vocabularies kept that are
            too large for memory; None: the user's caches.
        reloaded: told "switched", "unchanged", "refused" or "failed" after every attempt.

    Attributes:
        scorer: the one in use. Whoever took it may go on with it; its tables live as long as it does.
        refused: the newest version that was refused and why, or None.

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
    ) -> None:
        self._cache = cache
        self.root, self.histories, self._reloaded = root, histories, reloaded
        self._vocabulary = vocabulary
        self.refused: tuple[str, str] | None = None
        self._lock = threading.Lock()
        self.scorer = self._load(resolve(root))

    def shown(self) -> str:
        """How to call the version in use: where it lies, and where it was fetched to."""
        return shown(self.root, self.scorer.snapshot.path)

    def newer(self) -> Path | None:
        """The version that LATEST names, unless it is served or was refused.

        Raises:
            SnapshotError: LATEST is gone or names no version.
        """
        path = resolve(self.root)
        known = {self.scorer.version, self.refused[0] if self.refused else ""}
        return None if path.name in known else path

    def reload(self, retry: bool = True) -> bool:
        """Switch to the newest version; False if it is served already. Blocks; requests go on meanwhile.

        Args:
            retry: try a version again that was refused before.

        Raises:
            UnavailableError: a store or a disk fails now. TandemError: the new version was refused. The old
                one stays.
        """
        with self._lock:
            path = resolve(self.root) if retry else self.newer()
            if path is None or path.name == self.scorer.version:
                self._reloaded("unchanged")
                return False
            try:
                # The name changes last: until then every request gets the old scorer.
                self.scorer = self._load(path)
            except Exception as error:
                if isinstance(error, TandemError) and not isinstance(error, UnavailableError):
                    self.refused = (path.name, str(error))
                    self._reloaded("refused")
                else:
                    # No fault of the version, as far as anybody knows: it is tried again.
                    self._reloaded("failed")
                raise
            self.refused = None
            self._reloaded("switched")
            return True

    def _load(self, path: Path) -> Scorer:
        snapshot = load_fetched(path, self._cache)
        snapshot.self_check()
        if self.histories is not None:
            known = self.histories.manifest
            snapshot.check_vocabularies({**known.features, **known.context}, self.histories.log)
        scorer = Scorer(snapshot, self.histories.chunk if self.histories else 0)
        scorer.vocabularies = vocabularies_of(snapshot, self._vocabulary, self._cache)
        users = self.histories.users if self.histories is not None else None
        drop_unused(each.folder for each in (*scorer.vocabularies.values(), users) if each is not None)
        # Once more with the searches that serve, which also brings what they need into memory.
        snapshot.check_own(snapshot.score(snapshot.recorded.batch))
        return scorer
