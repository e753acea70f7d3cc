"""A run folder: config.toml, metrics.jsonl, TensorBoard events, checkpoints/, summary.json."""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import tomli_w
from torch.utils.tensorboard import SummaryWriter

from embeddings.agreement import from_rank_0
from embeddings.errors import CheckpointError, ConfigError, DataError
from trainer.ranks.launcher import launcher_name, restarted
from trainer.ranks.machine import cores, installed
from trainer.run_config import Config, load_config
from trainer.sealed_folder import locked, naming, remove_folder, write_text
from trainer.storage import is_remote
from trainer.storage.spool import Spool

_CONFIG = "config.toml"
# Of each domain the board has these curves, and none where there are more domains.
_OF_DOMAINS = ("auc", "logloss", "pcoc")
_MOST_DOMAINS = 20
# In what a training in a store says of itself, what comes before its job; and how many former jobs it names.
_OF_JOB, _MOST_JOBS = ", of ", 100
_PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchx", "pyarrow", "numpy")


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        # Where the plain tables of `train.init_from` lie until they are read.
        self.first_weights = path / "init.tmp"
        self.metrics, self.summary = path / "metrics.jsonl", path / "summary.json"
        # A drawing of the shares of branches, where a phase has some.
        self.shares = path / "lambda.svg"
        # Of a run in a store: what the training that began last says of itself, and what this one said.
        self._newest, self._mine = path / ".training", ""

    def scores(self, split: str, sampled: bool = False, averaged: bool = False) -> Path:
        """Where `evaluate` keeps the scores of a split, or of a sample of it, by raw or averaged weights."""
        parts = [f"scores-{split}", *(["averaged"] if averaged else []), *(["sample"] if sampled else [])]
        return self.path / f"{'-'.join(parts)}.parquet"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second training out of this folder while this one runs.

        A store keeps no locks: there the training that begins last goes on, see `check_newest`.

        Raises:
            ConfigError: another process trains here, or the folder cannot be written.
        """
        without = "two trainings in one folder go unnoticed"
        if is_remote(self.path):
            without = "of two trainings in one folder the older one ends at its next save"
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path / ".lock", without))
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another training is running in this folder") from None
            except OSError as error:
                raise ConfigError(f"{self.path}: cannot be locked: {error}") from None
            # Only a start that was killed while it read them has left any.
            remove_folder(self.first_weights)
            if is_remote(self.path):
                self._mine = self._marker()
                write_text(self._newest, self._mine)
            yield

    def check_not_ousted(self) -> None:
        """Raises:
        ConfigError: in a store, another training took over from this job, which was then restarted.
        """
        if is_remote(self.path):
            self._marker()

    def _marker(self) -> str:
        """What this training says of itself, and below it which jobs trained here before.

        Raises:
            ConfigError: this job is one of them, and nobody but its launcher wants it again.
        """
        job = launcher_name()
        newest, *former = self._read_newest().splitlines() or [""]
        holder = newest.partition(_OF_JOB)[2]
        if holder != job:
            if job and job in former and restarted():
                raise ConfigError(
                    f"{self.path}: another training began in this run folder after this one ({newest}), so "
                    f"this restart of {job} ends; to train here again all the same, start it as a new job"
                )
            former = [*(each for each in former if each not in (holder, job)), *([holder] if holder else [])]
        now = datetime.now(UTC).isoformat(" ", "seconds")
        mine = f"{socket.gethostname()}, process {os.getpid()}, {now}, {os.urandom(4).hex()}"
        return "\n".join([mine + (_OF_JOB + job if job else ""), *former[-_MOST_JOBS:]])

    def _read_newest(self) -> str:
        """What the training that began last says of itself; nothing where there was none."""
        with suppress(FileNotFoundError):
            return self._newest.read_bytes().decode(errors="replace")
        return ""

    def check_newest(self) -> None:
        """Raises:
        ConfigError: in a store, another training has begun in this folder since `lock`.
        """
        # A store that cannot be read now is told of by whatever is written next.
        with suppress(OSError):
            newest = self._newest.read_bytes().decode(errors="replace") if self._mine else ""
            if newest != self._mine:
                other = next(iter(newest.splitlines()), "")
                raise ConfigError(
                    f"{self.path}: another training began in this run folder ({other}), so this one ends "
                    "without another save; the other goes on"
                )

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

    def read_summary(self) -> dict[str, Any]:
        """What summary.json holds, nothing where there is none.

        Raises:
            DataError: it is no JSON object.
        """
        if not self.summary.exists():
            return {}
        try:
            entries = json.loads(self.summary.read_text(encoding="utf-8"))
        except ValueError:
            entries = None
        if not isinstance(entries, dict):
            raise DataError("is no JSON object; move it away, and it is written anew", file=self.summary)
        return entries

    def update_summary(self, entries: Mapping[str, Any]) -> None:
        """Merge entries into summary.json."""
        write_text(self.summary, json.dumps({**self.read_summary(), **jsonable(entries)}, indent=1))

    def drop_metrics_after(self, step: int, validated: int) -> int:
        """Forget lines of steps that a resumed run is about to repeat.

        Args:
            validated: the step after which it repeats validations.

        Returns:
            The step of the newest validation that is left, -1 where there is none.
        """
        if not self.metrics.exists():
            return -1
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        kept = [
            line
            for line in lines
            if 0 <= _step_of(line) <= (min(step, validated) if _of_validation(line) else step)
        ]
        write_text(self.metrics, "".join(line + "\n" for line in kept))
        return max((_step_of(line) for line in kept if _of_validation(line)), default=-1)


def _of_validation(line: str) -> bool:
    return '"split": "validation"' in line or '"split": "window"' in line


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard on rank 0, and does nothing on the others.

    Making one is collective: where rank 0 cannot open its files, all ranks hear of it.
    """

    def __init__(self, folder: RunFolder, resumed_at: int) -> None:
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._spool: Spool | None = None
        self._folder, self._run = folder.path, folder

        def open_files() -> None:
            metrics, board = folder.metrics, folder.path / "tensorboard"
            if is_remote(folder.path):
                self._spool = Spool()
                metrics, board = self._spool.file(metrics), self._spool.folder(board)
            self._file = metrics.open("a", encoding="utf-8")
            # Events of steps that are about to be repeated disappear from the board.
            with naming(board):
                self._board = SummaryWriter(str(board), purge_step=resumed_at + 1)

        from_rank_0(open_files)

    def __enter__(self) -> MetricsLog:
        return self

    def keep(self, lenient: bool = False) -> None:
        """Have all lines so far where the run lies, before a checkpoint that says that they are there.

        Only where the run lies in a store: a local file has them already.

        Args:
            lenient: what cannot be uploaded is said, and tried again later.

        Raises:
            CheckpointError: the store cannot be written.
            ConfigError: another training has begun in this folder, whose lines stay.
        """
        if self._spool and self._board:
            self._give_way()
            self._board.flush()
            if lenient:
                self._spool.offer()
                return
            try:
                self._spool.keep()
            except OSError as error:
                what = f"{error.strerror or error}; older checkpoints are untouched"
                again = "once this is mended, the same command goes on from the newest"
                raise CheckpointError(error.filename or self._folder, f"{what}: {again}") from error

    def _give_way(self) -> None:
        """Raises ConfigError, and uploads nothing more, where another training has begun in this folder."""
        try:
            self._run.check_newest()
        except ConfigError:
            if self._spool:
                self._spool.forget()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file and self._board:
            self._file.close()
            with naming(self._board.log_dir):
                self._board.close()
        if self._spool:
            with suppress(ConfigError):
                self._give_way()
            self._spool.close(failing=kind is not None)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """One line: step, split and the values in full precision.

        Values may hold those of every task under `tasks`; on the board they are `SPLIT/TASK/NAME`, where
        there are several tasks. For `by_domain` and `over_domains` see `SplitMetrics.entry` and `on_board`.
        """
        if self._file is None or self._board is None:
            return
        with naming(self._file.name):
            self._file.write(json.dumps(jsonable({"step": step, "split": split, **values})) + "\n")
            self._file.flush()
        with naming(self._board.log_dir):
            for tag, value in on_board(split, values):
                self._board.add_scalar(tag, value, step)
        if self._spool and self._spool.due:
            # The next save, of which all ranks hear, ends this training.
            with suppress(ConfigError):
                self._give_way()
            self._board.flush()
            self._spool.offer()


def check_writable(out: Path) -> None:
    """Raises:
    ConfigError: no run can be written there.
    """
    if is_remote(out):
        # Of a start that was killed between the two, the next one takes it away.
        probe = out / "writable.tmp"
        try:
            probe.write_bytes(b"?")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from None
        return
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out}: {folder} cannot be written ({error.strerror})") from None


def on_board(split: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The curves of TensorBoard, with their tags: `SPLIT/NAME` and `SPLIT/TASK/NAME`.

    A metric without a value has no point. What is said over all domains has tags like these. Domains have a
    few curves each, `SPLIT by domain/DOMAIN/...`, unless there are so many that nobody would look at them.
    The shares of branches are `SPLIT/lambda/BRANCH`. What `trainer.update.dominance` reports is
    `dominance mean/UNIT/TASK` and `dominance dominated/UNIT/TASK`; that of `trainer.update.gradient_watch` is
    `gradient norm/UNIT/ROLE`, `gradient cosine/UNIT` and `gradients in conflict/UNIT`, the share of rows.
    """
    for branch, share in values.get("lambda", {}).items():
        yield f"{split}/lambda/{branch}", share
    domains: Mapping[str, Mapping[str, Any]] = values.get("by_domain", {})
    whole = {key: value for key, value in values.items() if key not in ("by_domain", "over_domains")}
    for entry in (whole, values.get("over_domains", {})):
        yield from _curves(split, entry)
    for kind, units in values.get("dominance", {}).items():
        for unit, of_tasks in units.items():
            yield from ((f"dominance {kind}/{unit}/{task}", share) for task, share in of_tasks.items())
    yield from _of_gradients(values.get("gradients", {}))
    for domain, entry in domains.items() if len(domains) <= _MOST_DOMAINS else ():
        yield from _curves(f"{split} by domain/{domain}", entry, _OF_DOMAINS)


def _of_gradients(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for unit, roles in found.get("norm", {}).items():
        yield from ((f"gradient norm/{unit}/{role}", norm) for role, norm in roles.items())
    for unit, cosine in found.get("cosine", {}).items():
        yield f"gradient cosine/{unit}", cosine
        yield f"gradients in conflict/{unit}", found["conflict"][unit]["rows"]


def _curves(
    prefix: str, entry: Mapping[str, Any], names: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """The numbers of an entry, and of each task where it has several; only `names`, if there are any."""
    tasks: Mapping[str, Mapping[str, Any]] = entry.get("tasks", {})
    parts = {"": entry, **({f"{task}/": own for task, own in tasks.items()} if len(tasks) > 1 else {})}
    for part, own in parts.items():
        for name, value in own.items():
            shown = isinstance(value, int | float) and not math.isnan(value)
            if shown and (name in names or not names):
                yield f"{prefix}/{part}{name}", value


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
    if isinstance(value, list):
        return [jsonable(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the machine they were made on."""
    machine = {"python": platform.python_version(), "machine": f"{platform.machine()}, {cores()} cores"}
    return machine | {package: version for package in _PACKAGES if (version := installed(package))}
