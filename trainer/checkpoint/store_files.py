"""DCP's files in any place: its own file system makes a local path of whatever it is given."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from trainer.storage import is_remote

# Bytes that are fetched at least, and beyond what was asked for: headers are read in small pieces.
_AHEAD = 1 << 20


class StoreFiles(FileSystem):
    """Files of a checkpoint, on this machine or in a store."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        ahead: dict[str, Any] = {"block_size": _AHEAD, "cache_type": "readahead"} if is_remote(path) else {}
        with path.open(mode, **ahead) as stream:
            yield cast(io.IOBase, stream)

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: str | os.PathLike[str]) -> Any:
        return Path(path) if isinstance(path, str) else path

    def rename(self, path: Any, new_path: Any) -> None:
        """In a store a copy: DCP does it with its metadata alone, which are small."""
        if is_remote(path):
            new_path.write_bytes(path.read_bytes())
            path.unlink()
        else:
            path.rename(new_path)

    def mkdir(self, path: Any) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()
