"""Starting the command line in processes of its own, on one rank or several, with a time limit.

They are forked from one server that has done the slow imports, which else cost each process five seconds of
a core. That torchrun and a plain `python -m` start it alike is shown where those are what is tested.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
# There is one such server in a process, for all that ask. What is run itself must not be among the imports.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests.programs.without_collector",
        "tests.programs.without_syncs",
        *(
            f"pipelines.{verb}"
            for verb in ("train", "evaluate", "export", "score", "ingest.ingest", "plan.plan")
        ),
        *(f"benchmarks.{name}" for name in ("step", "scaling", "quality", "search")),
        # What these import only once they work.
        "pandas",
        "pyarrow.dataset",
        "pyarrow.pandas_compat",
        "torch.distributed.optim",
        "torch.utils.serialization",
        "torch._subclasses.schema_check_mode",
        "trainer.storage.s3",
        "launch.options",
        "launch.reporting",
        "tests.helpers.logs",
        "tests.programs.drive",
        "tests.trainer.data.test_reader_kill",
        "tests.programs.frozen",
    ]
)
# Two groups of unequal width, many steps from little data.
SETTINGS = {
    "data.history_length": 16,
    "data.batch_candidates": 24,
    "data.requests_per_block": 2,
    "data.shuffle_row_groups": 2,
    "model.k": 4,
    "model.hidden": [8],
    "groups.attention.dim": 4,
    "groups.representation.dim": 8,
    "train.log_every": 1,
    "train.warmup_steps": 3,
}


def overrides(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def start_server() -> None:
    """Have the server import what it forks with; does nothing where it runs."""
    from multiprocessing import forkserver

    # What reads them does so once, when it is loaded. Whether g++ knows the vectors of this processor is
    # found out by compiling a large program for each kind; where it does not, the tests of that fail.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", TORCHINDUCTOR_VEC_ISA_OK="1"):
        forkserver.ensure_running()


def _member(module: str, words: Sequence[str], environment: Mapping[str, str], said: tuple[str, str]) -> None:
    """One process: `python -m MODULE WORDS`."""
    for stream, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _environments(ranks: int) -> list[dict[str, str]]:
    """Of every rank: what torchrun says to it, and nothing where there is one process alone."""
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        return [own]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(processes: Sequence[ForkServerProcess], timeout: float) -> int:
    """The exit code of the whole, as torchrun's: where one process fails, the others are ended."""
    end = time.monotonic() + timeout
    while left := [process for process in processes if process.exitcode is None]:
        if not connection.wait([process.sentinel for process in left], max(0, end - time.monotonic())):
            raise subprocess.TimeoutExpired("ranks", timeout)
        if any(process.exitcode for process in processes):
            for process in left:
                process.terminate()
    codes = [process.exitcode or 0 for process in processes]
    return codes[0] if len(codes) == 1 else int(any(codes))


def launched(
    module: str, *words: str, ranks: int = 1, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE WORDS` on so many ranks; none outlives the call.

    Raises:
        TimeoutExpired: it took longer than `timeout` seconds.
    """
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        said = (f"{folder}/out", f"{folder}/err")
        processes = [
            SERVER.Process(target=_member, args=(module, words, environment, said))
            for environment in _environments(ranks)
        ]
        try:
            for process in processes:
                process.start()
            code = _wait(processes, timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        texts = [Path(path).read_text(encoding="utf-8") if Path(path).exists() else "" for path in said]
    return subprocess.CompletedProcess([module, *words], code, *texts)


def reported(module: str, root: Path, timeout: float = 280) -> dict[str, Any]:
    """What `python -m MODULE ROOT` has written to report.json there."""
    done = launched(module, str(root), timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((root / "report.json").read_text())
    return found


def tandemrec(*words: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return launched("launch.cli", *words, ranks=ranks, timeout=timeout)


@contextmanager
def started(*words: str) -> Iterator[tuple[ForkServerProcess, Path, Path]]:
    """The command line beside the test, and files of its stdout and stderr; it ends with the block."""
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        process = SERVER.Process(
            target=_member, args=("launch.cli", words, _environments(1)[0], (str(out), str(err)))
        )
        process.start()
        try:
            yield process, out, err
        finally:
            process.kill()
            process.join()


def torchrun(
    module: str, *words: str, ranks: int = 2, max_restarts: int = 0, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """The same under torchrun itself, for tests of what it adds."""
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", module, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(log: Path, run: Path, ranks: int = 1, preset: str = "dare", **settings: Any) -> list[float]:
    """Train a preset on a log; returns the loss of every step."""
    changed = {"data.log": str(log), **SETTINGS, **{k.replace("__", "."): v for k, v in settings.items()}}
    if preset == "twin_paper_dare":
        changed = {k: v for k, v in changed.items() if not k.startswith(("groups.a", "groups.r"))}
    done = tandemrec(
        "train", "--config", f"configs/{preset}.toml", "--out", str(run), *overrides(changed), ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]
