"""Running an iterator ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)


class Closable(Protocol[Item_co]):
    """An iterator that can be ended early: a generator or a Prefetcher."""

    def __iter__(self) -> Iterator[Item_co]: ...

    def __next__(self) -> Item_co: ...

    def close(self) -> None: ...


class Prefetcher(Iterator[Item], Generic[Item]):
    """At most `depth` items ahead; the iterator's exceptions surface in the consumer, `close` ends it."""

    def __init__(self, items: Closable[Item], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    break
            else:
                self._put(StopIteration())
        except BaseException as error:
            self._put(error)
        finally:
            # Generators hold pools and files: they are closed by the thread that ran them.
            self._items.close()

    def _put(self, item: Item | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Item:
        if self._over:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._over = True
            raise item
        return item

    def close(self) -> None:
        """Stop the thread; safe to call more than once."""
        self._over = True
        self._stop.set()
        self._thread.join()
