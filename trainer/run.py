"""A run folder: config.toml, metrics.jsonl, TensorBoard events, checkpoints/, summary.json."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli_w
from torch.utils.tensorboard import SummaryWriter

from embeddings.errors import ConfigError
from trainer.config import Config, load_config
from trainer.durable import write_text

_CONFIG = "config.toml"
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchx", "pyarrow", "numpy")


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def scores(self, split: str) -> Path:
        """Where `evaluate` keeps the scores of a split."""
        return self.path / f"scores-{split}.parquet"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second training out of this folder while this one runs.

        Raises:
            ConfigError: another process trains here.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{self.path}: another training is running in this folder") from None
            yield

    def check_free(self) -> None:
        """Raises:
        ConfigError: another process trains here.
        """
        if (self.path / ".lock").exists():
            with self.lock():
                pass

    def write_config(self, config: Config) -> None:
        """Keep the resolved config."""
        self.path.mkdir(parents=True, exist_ok=True)
        tree = config.model_dump(mode="json", exclude_none=True)
        write_text(self.path / _CONFIG, tomli_w.dumps(tree))

    def read_config(self) -> Config:
        """The resolved config of this run.

        Raises:
            ConfigError: the folder is no run.
        """
        file = self.path / _CONFIG
        if not file.is_file():
            raise ConfigError(
                f"{self.path}: no run here ({_CONFIG} is missing); train one with --out {self.path}"
            )
        return load_config(file)

    def update_summary(self, entries: Mapping[str, Any]) -> None:
        """Merge entries into summary.json."""
        summary = json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else {}
        write_text(self.summary, json.dumps({**summary, **jsonable(entries)}, indent=1))

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run is about to repeat."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if 0 <= _step_of(line) <= step]
        write_text(self.metrics, "".join(line + "\n" for line in kept))


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard; does nothing on ranks that do not speak."""

    def __init__(self, folder: RunFolder, speaks: bool, resumed_at: int) -> None:
        self._file = folder.metrics.open("a", encoding="utf-8") if speaks else None
        self._board: SummaryWriter | None = None
        if speaks:
            # Events of steps that are about to be repeated disappear from the board.
            self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=resumed_at + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file and self._board:
            self._file.close()
            self._board.close()

    def write(self, step: int, split: str, values: Mapping[str, float | int]) -> None:
        """One line: step, split and the values in full precision."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(jsonable({"step": step, "split": split, **values})) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)


def _step_of(line: str) -> int:
    """Step of a metrics line; -1 for one that a crash cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def jsonable(value: Any) -> Any:
    """NaN and infinity have no JSON form: they become null."""
    if isinstance(value, Mapping):
        return {key: jsonable(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the machine they were made on."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
