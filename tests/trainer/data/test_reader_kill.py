"""SIGKILL within an epoch: what lies before the saved cursor and what is read after it are one epoch.

The processes are real: each rank is one, forked by a server that has done the slow imports, and none is told
that it will die. Work after the last cursor that all ranks have saved is lost and delivered again, so a
delivery counts if a saved cursor covers it or if it comes after the last resume.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.train import train
from tests.helpers.launching import ROOT, SERVER, SETTINGS, losses, start_server
from tests.helpers.logs import Shape, random_rows, small_log, write_log
from tests.trainer.test_ranks import parameters
from trainer.config.sections import DataConfig
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader

SEED, EPOCHS, LIMIT_S = 9, 2, 120.0

Place = tuple[str, int, int, int]  # file, row group, row, request
Key = tuple[int, int]  # user, request


@dataclass(frozen=True)
class Job:
    """One rank's part of a reading.

    Attributes:
        start: where the reading begins; hold: the end of the step before which this rank waits to be killed.
        folder: where it keeps deliveries-<rank> and cursor-<rank>.
        changes: of the reader's config.
    """

    log: Path
    folder: Path
    rank: int
    world_size: int
    start: Cursor
    hold: Cursor | None
    changes: dict[str, Any]


def config(log: Path, **changes: Any) -> DataConfig:
    base = {"history_length": 8, "requests_per_block": 2, "batch_candidates": 12, "shuffle_row_groups": 3}
    return DataConfig(log=log, **{**base, **changes})


def consume(job: Job) -> None:
    """What a rank does: note each delivered request, and save its cursor every third step."""
    reader = SequenceLogReader(
        config(job.log, **job.changes), "train", None, rank=job.rank, world_size=job.world_size, seed=SEED
    )
    number = 0
    with (job.folder / f"deliveries-{job.rank}").open("w", encoding="utf-8") as notes:
        for epoch in range(job.start.epoch, EPOCHS):
            for step in reader.steps(job.start if epoch == job.start.epoch else Cursor(epoch=epoch)):
                number += 1
                if step.after == job.hold:
                    time.sleep(2 * LIMIT_S)
                names = zip(step.batch.user_id.tolist(), step.batch.request_id.tolist(), strict=True)
                notes.writelines(f"{number} {epoch} {u} {r}\n" for u, r in names if step.counted)
                notes.flush()
                if number % 3 == 0:
                    save(job.folder / f"cursor-{job.rank}", number, step.after)
                time.sleep(0.002)


def save(path: Path, number: int, cursor: Cursor) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps([number, cursor.epoch, cursor.blocks]), encoding="utf-8")
    part.replace(path)


def saved(folder: Path, rank: int, start: Cursor) -> tuple[int, Cursor]:
    """-> (steps since the start, cursor) as of the rank's last save."""
    path = folder / f"cursor-{rank}"
    if not path.exists():
        return 0, start
    number, epoch, blocks = json.loads(path.read_text(encoding="utf-8"))
    return number, Cursor(0, epoch, blocks)


def order(cursor: Cursor) -> tuple[int, int]:
    return cursor.epoch, cursor.blocks


def delivered(folder: Path, world_size: int, until: int) -> Counter[tuple[int, Key]]:
    """What all ranks delivered in the first `until` steps: (epoch, (user, request))."""
    found: Counter[tuple[int, Key]] = Counter()
    for rank in range(world_size):
        for line in (folder / f"deliveries-{rank}").read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # cut short by the kill, hence after every saved cursor
            number, epoch, user, request = map(int, line.split())
            if number <= until:
                found[epoch, (user, request)] += 1
    return found


def places(log: Path) -> dict[Key, Place]:
    """Where each request lies, as the files say."""
    found = {}
    for file in sorted((log / "train").glob("*.parquet")):
        with pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):
                rows = parquet.read_row_group(group, columns=["user_id", "request_id"]).to_pylist()
                for row, entry in enumerate(rows):
                    for at, request in enumerate(entry["request_id"]):
                        found[entry["user_id"], request] = (file.name, group, row, at)
    return found


@contextmanager
def running(
    target: Callable[..., None], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[list[ForkServerProcess]]:
    """A process for each job; none of them outlives the block."""
    start_server()
    processes = [SERVER.Process(target=target, args=job) for job in jobs]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join(LIMIT_S)


def wait(what: Callable[[], bool], processes: Sequence[ForkServerProcess]) -> None:
    """Until `what`, while all processes live."""
    end = time.monotonic() + LIMIT_S
    while not what():
        assert all(process.is_alive() for process in processes), [p.exitcode for p in processes]
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.001)


def read_and_die(jobs: list[Job], at: Cursor, rng: np.random.Generator) -> None:
    """Kill every rank, in some order, once the slowest has saved the cursor `at` or a later one."""
    folder, start = jobs[0].folder, jobs[0].start

    def there() -> bool:
        cursors = [saved(folder, rank, start)[1] for rank in range(len(jobs))]
        return min(map(order, cursors)) >= order(at)

    with running(consume, [(job,) for job in jobs]) as processes:
        wait(there, processes)
        for rank in rng.permutation(len(jobs)):
            time.sleep(float(rng.uniform(0, 0.004)))
            os.kill(processes[rank].pid or 0, signal.SIGKILL)
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * len(jobs)


def read_to_the_end(jobs: list[Job]) -> None:
    with running(consume, [(job,) for job in jobs]) as processes:
        for process in processes:
            process.join(LIMIT_S)
        assert [process.exitcode for process in processes] == [0] * len(jobs)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("kill") / "log", {"train": random_rows(3, Shape(users=60))})


WAYS: list[dict[str, Any]] = [
    {"workers": 0, "prefetch": 0},
    {"workers": 2, "prefetch": 3},
    {"workers": 1, "prefetch": 1, "sharding": "row_groups"},
    {"workers": 3, "prefetch": 0},
]


@pytest.mark.parametrize(
    ("sizes", "epochs"),
    [
        ([1, 2], [0]),
        ([2, 4], [1]),
        ([4, 1], [0]),
        ([2, 4, 1, 2], [0, 0, 1]),
    ],
)
def test_kill_and_resume_deliver_every_request_of_an_epoch_once(
    log: Path, tmp_path: Path, sizes: list[int], epochs: list[int]
) -> None:
    """`epochs` says in which epoch each reading is killed; the next one has the next number of ranks."""
    rng = np.random.default_rng([*sizes, *epochs])
    whole = SequenceLogReader(config(log), "train", None, seed=SEED)
    ends = [[step.after for step in whole.steps(Cursor(epoch=epoch))] for epoch in range(EPOCHS)]
    found: Counter[tuple[int, Key]] = Counter()
    cursor = Cursor()
    for number, world_size in enumerate(sizes):
        folder = tmp_path / str(number)
        folder.mkdir()
        changes = WAYS[(number + sizes[0]) % len(WAYS)]
        jobs = [Job(log, folder, r, world_size, cursor, None, changes) for r in range(world_size)]
        if number == len(epochs):
            read_to_the_end(jobs)
            found += delivered(folder, world_size, sys.maxsize)
            continue
        # Killed after one of the next steps of the epoch; on a slow machine the ranks wait for it.
        left = [end for end in ends[epochs[number]] if order(end) > order(cursor)]
        at = int(rng.integers(len(left) // 3))
        read_and_die([replace(job, hold=left[at + 7]) for job in jobs], left[at], rng)
        until, cursor = min((saved(folder, r, cursor) for r in range(world_size)), key=lambda at: at[0])
        assert cursor.epoch == epochs[number] and 0 < cursor.blocks < left[-1].blocks
        found += delivered(folder, world_size, until)
    where = places(log)
    for epoch in range(EPOCHS):
        once = Counter({where[key]: n for (at, key), n in found.items() if at == epoch})
        assert once == Counter(where.values())


def train_rank(rank: int, world_size: int, port: int, run: Path, log: Path) -> None:
    """One rank of `tandemrec train`, as a launcher starts it."""
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in launcher.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    output = os.open(run.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    settings = {**SETTINGS, "data.log": str(log), "train.epochs": 3, "checkpoint.every_steps": 5}
    train(ROOT / "configs/dare.toml", run, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def trained(run: Path, log: Path, world_size: int, kill_at: int = 0, victim: int = 0) -> None:
    """Train to the end, or until a checkpoint of step `kill_at` is there and rank `victim` is killed."""
    port = free_port()
    jobs = [(rank, world_size, port, run, log) for rank in range(world_size)]
    with running(train_rank, jobs) as processes:
        if kill_at:
            wait(lambda: newest(run) >= kill_at, processes)
            os.kill(processes[victim].pid or 0, signal.SIGKILL)
        for process in processes:
            process.join(LIMIT_S)
        codes = [process.exitcode for process in processes]
        texts = "".join(path.read_text() for path in run.parent.glob(f"{run.name}.*.log"))
        # The others hear of it from the connection, and end themselves.
        assert all(codes) and codes[victim] == -signal.SIGKILL if kill_at else not any(codes), texts


def newest(run: Path) -> int:
    return max((int(path.name[-8:]) for path in (run / "checkpoints").glob("step-????????")), default=0)


def test_training_killed_twice_ends_with_the_weights_of_an_unbroken_run(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log", seed=1, users=40)
    whole, run = tmp_path / "whole", tmp_path / "run"
    trained(whole, log, 2)
    steps = len(losses(whole))
    trained(run, log, 2, kill_at=steps // 5, victim=1)
    assert 0 < newest(run) < steps
    first = newest(run)
    trained(run, log, 2, kill_at=2 * steps // 5, victim=0)
    assert first < newest(run) < steps
    trained(run, log, 2)
    assert losses(run) == losses(whole)
    reference = parameters(whole)
    found = parameters(run)
    assert found.keys() == reference.keys() and len(found) > 8
    for name, tensor in found.items():
        assert torch.equal(tensor, reference[name]), name
