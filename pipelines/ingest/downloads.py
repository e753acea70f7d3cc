"""Raw tables that lie in an object store: the engines read files, so these are fetched first."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from embeddings.errors import DataError
from trainer.storage import is_remote, place
from trainer.storage.objects import below, copy_file, in_parallel
from trainer.storage.places import store_of

_AT_ONCE = 4


class Downloads:
    """A temporary folder with what was fetched, by address; use as a context manager.

    Messages name a file by its place in there, which ends in the address.
    """

    def __init__(self) -> None:
        # Made when something is fetched.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._known: dict[str, Path] = {}

    def __enter__(self) -> Downloads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._known = None, {}

    def local(self, given: Any) -> Any:
        """A file, folder or pattern as it is; where it is an address, the same of what was fetched.

        Raises:
            DataError: there is nothing, or it cannot be fetched.
            ConfigError: no place has such an address.
        """
        source = place(given)
        if not is_remote(source):
            return given
        if str(source) not in self._known:
            self._known[str(source)] = self._fetched(source)
        return self._known[str(source)]

    def _fetched(self, source: Path) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="tandemrec-")
        store, root = store_of(source)
        target = Path(self._folder.name, *str(source).replace("://", "/").split("/"))
        base = Path(*target.parts[: len(target.parts) - len(root.strip("/").split("/"))])
        try:
            found = store.glob(root) if set(root) & set("*?[") else [root]
            files = [file for each in found for file in store.find(each)]
            names = {file: below(base, file.strip("/")) for file in files if not file.endswith("/")}
            if not names:
                raise DataError("no such file, or an empty folder; name a Parquet or CSV file", file=source)
            for path in names.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            scheme = str(source).partition("://")[0]
            in_parallel(
                lambda file: copy_file(place(f"{scheme}://{file.lstrip('/')}"), names[file]), names, _AT_ONCE
            )
        except OSError as error:
            problem = f"cannot be fetched to {self._folder.name}: {error.strerror or error}"
            raise DataError(problem, file=error.filename or source) from None
        return target


downloads = Downloads()
