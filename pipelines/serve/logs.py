"""What the server says: one line an event, as text for people or as JSON for collectors of logs."""

from __future__ import annotations

import json
import logging
import random
import sys
import time
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from pipelines.serve.settings import LogSettings

# Of an error's traceback, what a line of JSON has.
_LONGEST_TRACEBACK = 8_000


class Log:
    """Writes events. A disk that is full must not end what a server does, so nothing here raises.

    Args:
        settings: the form, and how many of the scored bodies get a line.
    """

    def __init__(self, settings: LogSettings | None = None) -> None:
        self._settings = settings or LogSettings()
        # Which bodies get a line is no result: it needs no seed.
        self._draw = random.Random()

    def say(self, event: str, message: str, **fields: Any) -> None:
        """One line.

        Args:
            event: what happened, one of a few words, by which a collector counts.
            message: for people, in one line.
            fields: numbers and names; of clients, nothing that tells who they are.
        """
        with suppress(Exception):
            print(self._line(event, " ".join(message.split()), fields), flush=True)

    def failure(self, event: str, message: str, error: BaseException | None = None) -> None:
        """One line on standard error, and in text the traceback below it."""
        with suppress(Exception):
            shown = "" if error is None else "".join(traceback.format_exception(error)).rstrip()
            if self._settings.format == "json":
                fields = {"level": "error", "traceback": shown[-_LONGEST_TRACEBACK:]}
                print(self._line(event, message, fields), file=sys.stderr, flush=True)
            else:
                print("\n".join(filter(None, (message, shown))), file=sys.stderr, flush=True)

    def scored(self, **fields: Any) -> None:
        """A line for one body in so many as the settings want."""
        share = self._settings.requests
        if share and self._draw.random() < share:
            words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fields.items())
            self.say("scored", f"scored: {words}", **fields)

    def _line(self, event: str, message: str, fields: dict[str, Any]) -> str:
        if self._settings.format == "text":
            return message
        when = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": when, "event": event, "message": message, **fields}, default=str)


class LibraryErrors(logging.Handler):
    """Passes on what a library logs as an error, so that it has the form of all other lines."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.ERROR)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._log.failure("internal error", record.getMessage().strip(), error)
