"""Trains a stream window by window: measure it, train it once, save, publish.

A window is measured before the model has seen anything of it (progressive validation), by the weights and
the maps of ids that a published version would have at that moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from embeddings.agreement import from_rank_0
from embeddings.errors import DataError
from trainer.checkpoint import save_load as checkpoint
from trainer.data.reader import SequenceLogReader
from trainer.data.stream.intake import Intake, Taken
from trainer.data.stream.ledger import Entry, Ledger
from trainer.data.stream.source import Window, damaged
from trainer.loop.loop import Trainer
from trainer.loop.progress import Progress
from trainer.quality.domains import SplitMetrics
from trainer.quality.evaluate import shared_metrics
from trainer.quality.metrics import entry_of
from trainer.quality.scored import Scored, Scores

_ITEM = "item_id"


@dataclass(frozen=True)
class Version:
    """A version that was published, as lines of metrics hold it.

    Attributes:
        step: of its checkpoint; line: for people; entry: what else is to be known.
    """

    step: int
    line: str
    entry: Mapping[str, Any]


class Publisher(Protocol):
    """Publishes checkpoints beside the training, on one rank; one at a time."""

    def due(self, ledger: Ledger) -> bool:
        """Whether a version is to be published of what the ledger holds."""

    def offer(self, step: int, ledger: Ledger) -> None:
        """Begin to publish the checkpoint of a step, once the version before is done.

        Raises:
            TandemError: versions fail one after the other.
        """

    def wait(self) -> None:
        """Until nothing is being published. Raises as `offer`."""

    def done(self) -> list[Version]:
        """The versions that were published since the last call. Raises where none can be any more."""


@dataclass(frozen=True)
class Stream:
    """What a training of a stream needs besides that of a log.

    Attributes:
        intake: of windows, and publisher, on rank 0; None on the others. Without publisher nothing is
            published.
        open: a reader of a window, for this rank; collective.
        limit: windows to train in this start, 0 = all; follow: wait for more where there are none.
        skip: damaged windows are left out.
    """

    intake: Intake | None
    publisher: Publisher | None
    open: Callable[[Window], SequenceLogReader]
    limit: int = 0
    follow: bool = False
    skip: bool = False


class WindowTrainer(Trainer):
    """A training of a stream on one rank; `stream` is to be set before it runs.

    Attributes:
        ledger: what was taken so far.
    """

    stream: Stream
    ledger = Ledger()
    # The window that is being trained; the digest of the one that the checkpoint of this start lies inside.
    _window: Window | None = None
    _inside = ""
    # Windows that this start has trained; saves since a checkpoint went to the publisher.
    _trained, _saves = 0, 0
    # Windows there behind the present one, and the second of the newest request of all.
    _waiting, _newest = 0, 0

    def resume(self, start: checkpoint.ResumePoint) -> None:
        """See `Trainer.resume`."""
        super().resume(start)
        if (state := start.state.get("stream")) is not None:
            self.ledger, self._inside = Ledger.of_state(state["ledger"]), state["inside"]

    def _train(self) -> None:
        # A stream has no length, of which a bar could show a share.
        self.bar = Progress("train", speaks=False)
        if not self._inside:
            # What an earlier start has saved and did not publish.
            self._publish()
        for window, reader in self._windows():
            with self._naming(window):
                measured = self._measure(window, reader)
                learned = self._learn(window, reader)
            if learned:
                self._save()
                self.saver.settle()
                self._publish()
                self._tell(window, measured)
        self._settle()

    @contextmanager
    def _naming(self, window: Window) -> Iterator[None]:
        """A block whose errors say which window it is whose file cannot be read."""
        try:
            yield
        except DataError as error:
            if error.file is None or not error.file.endswith(window.info.files[0].path):
                raise
            raise damaged(window.name, error, self.config.data.log) from None

    def _windows(self) -> Iterator[tuple[Window, SequenceLogReader]]:
        """Each window that is to be trained, with its reader; waits where more are to come. Collective."""
        while not self._run_over() and not (self.stream.limit and self._trained >= self.stream.limit):
            taken = from_rank_0(self._look, slow=True)
            self.ledger, self._waiting, self._newest = taken.ledger, taken.waiting, taken.newest
            for line in taken.lines:
                self.say(line)
            if taken.window is not None:
                reader = self._opened(taken.window)
                if reader is not None:
                    yield taken.window, reader
            elif self.stream.follow or taken.again:
                self._wait()
            else:
                return

    def _look(self) -> Taken:
        assert self.stream.intake is not None
        return self.stream.intake.next(self.ledger, self.at.step, self._inside)

    def _wait(self) -> None:
        """Let some time pass, and see whether to stop; collective."""
        self._write_versions()
        from_rank_0(lambda: time.sleep(self.config.online.poll_s))
        # As after step 0, at which all ranks look.
        self.stopped = self.interrupts.look(0, self.saver.failed).stop
        self.ranks.check_launcher()

    def _opened(self, window: Window) -> SequenceLogReader | None:
        """A reader of the window; None where it is damaged and left out. Collective."""
        try:
            return self.stream.open(window)
        except DataError as error:
            if not self.stream.skip or self._inside:
                raise
            self.say(f"window {window.name} is damaged and skipped: {error}")
            entry = Entry(
                self.ledger.taken, window.name, window.digest, window.stamp, "damaged", self.at.step
            )
            self.ledger = self.ledger.with_entry(entry)
            return None

    def _measure(self, window: Window, reader: SequenceLogReader) -> SplitMetrics | None:
        """Score a window before it is trained; None where that was done before a restart. Collective."""
        if self._inside or not self.config.online.evaluate:
            return None
        with self.validation.scored(reader, self.course.pipeline) as scores:
            metrics = shared_metrics(scores, reader)
            cold = from_rank_0(lambda: self._cold(scores), slow=True)
        lag = {"lag_windows": self._waiting, "lag_s": max(0, self._newest - window.newest)}
        entry = {"window": window.name, **metrics.entry(), **cold, **lag}
        self.log.write(self.at.step, "window", entry)
        return metrics

    def _cold(self, scores: Scores) -> dict[str, Any]:
        """Metrics of the candidates whose item had no row of its own yet, and of the others."""
        rules = self.config.id_rules.get(_ITEM)
        shared = 1 if rules is None else rules.shared_rows

        def kind(part: Scored) -> Any:
            return np.where(part.item_id < 0, -1, part.item_id < shared).astype(np.int64)

        found = scores.metrics_by(kind, range(len(scores.tasks)))
        # Where a log has no item, every candidate is of neither kind.
        names = {0: "known_items", 1: "cold_items"}
        return {names[part]: entry_of(own) for part, own in found.items() if part in names}

    def _learn(self, window: Window, reader: SequenceLogReader) -> bool:
        """Train what is left of a window; -> whether it is done. Collective."""
        self._window, self.course.reader, self.course.order = window, reader, reader.order
        self._epoch()
        if not self.at.cursor.epoch:
            return False
        entry = Entry(self.ledger.taken, window.name, window.digest, window.stamp, "trained", self.at.step)
        self.ledger = self.ledger.with_entry(entry, window.newest)
        self.at.cursor = self.at.cursor.next_window()
        self._window, self._inside = None, ""
        self._trained += 1
        return True

    def _publish(self) -> None:
        """Have the newest checkpoint published, if a version is due; collective."""

        def offer() -> bool:
            publisher, step = self.stream.publisher, self.saver.saved
            due = publisher is not None and step == self.at.step and publisher.due(self.ledger)
            if due and publisher is not None:
                publisher.offer(step, self.ledger)
            return due

        if from_rank_0(offer, slow=True):
            self._saves = 0
        self._write_versions()

    def _settle(self) -> None:
        """Wait for the version that is being published; collective."""
        publisher = self.stream.publisher
        from_rank_0(lambda: None if publisher is None else publisher.wait(), slow=True)
        self._write_versions()

    def _write_versions(self) -> None:
        """Say which versions were published meanwhile; collective, so that all hear where none can be."""
        publisher = self.stream.publisher
        for version in from_rank_0(lambda: [] if publisher is None else publisher.done()):
            self.say(version.line)
            self.log.write(version.step, "version", version.entry)

    def _tell(self, window: Window, measured: SplitMetrics | None) -> None:
        auc = "" if measured is None else f"{measured.text()} before training;"
        behind = f"; {self._waiting:,} more wait" if self._waiting else ""
        self.say(
            f"window {window.name}:{auc} trained {window.info.candidates:,} candidates, step {self.at.step:,}"
            f"{behind}"
        )

    def _measured_for_sure(self) -> int:
        # A window is measured again unless the checkpoint lies inside of it.
        return self.at.step if self.at.cursor.blocks else self.at.step - 1

    def _finished(self) -> bool:
        return self._run_over()

    def _more_state(self) -> dict[str, Any]:
        """The ledger; and before it, time for a version whose checkpoint this save would retire."""
        self._saves += 1
        if self._saves >= self.config.checkpoint.keep:
            self._settle()
        window = self._window if self.at.cursor.blocks else None
        inside = self._inside if window is None else window.digest
        return {"stream": {"ledger": self.ledger.state(), "inside": inside}}
