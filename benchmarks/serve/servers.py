"""The servers that are compared under load, each a process of its own, over one snapshot."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from benchmarks.harness.server_process import ServerProcess, serve_command, served
from benchmarks.inputs.served_model import JSON, ServedModel, draw, json_body
from embeddings.errors import TandemError

OURS = "tandemrec"
BARE, ONNX, SCORER = "bare FastAPI", "bare FastAPI, ONNX Runtime", "bare FastAPI, our scorer"
# One thread each: threads of OpenMP would else wait actively beside those of the others.
_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
# Scores are float32, and products are summed in another order.
_FAR = 1e-4


@dataclass(frozen=True)
class Running:
    """A server that listens; `start_s`: seconds from its command until then."""

    process: ServerProcess
    start_s: float


def start_servers(model: ServedModel, folder: Path, held: ExitStack) -> dict[str, Running]:
    """All servers by name, on one snapshot.

    No user's state is kept, since clients ask for few users, again and again.
    """
    version = model.publish(folder / "snapshot", 0)
    portable = folder / "portable"
    export = ["export", "--snapshot", str(version), "--format", "onnx", "--out", str(portable)]
    words = [sys.executable, "-m", "launch.cli", *export, "--parity-requests", "0"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    rival = [sys.executable, "-m", "benchmarks.rivals.fastapi_scorer"]
    commands = {
        OURS: serve_command(version, "grpc.port=0", "user_states.bytes=0"),
        BARE: [*rival, "torch", str(version)],
        ONNX: [*rival, "onnx", str(portable)],
        SCORER: [*rival, "scorer", str(version)],
    }
    running = {}
    for number, (name, command) in enumerate(commands.items()):
        started = time.perf_counter()
        process = held.enter_context(served(command, folder / f"said-{number}", _ENVIRONMENT))
        running[name] = Running(process, time.perf_counter() - started)
    return running


def check_alike(running: dict[str, Running], model: ServedModel, shape: tuple[int, int]) -> None:
    """Compare the servers' answers to one body.

    Args:
        shape: behaviors and candidates.

    Raises:
        TandemError: two servers score it otherwise.
    """
    body, scores = json_body(draw(model, 0, *shape)), {}
    for name, server in running.items():
        url = f"http://127.0.0.1:{server.process.port}/score"
        answer = httpx.post(url, content=body, headers={"content-type": JSON}, timeout=60)
        answer.raise_for_status()
        scores[name] = np.array(answer.json()["results"][0]["scores"]["click"])
    for name, each in scores.items():
        far = float(np.abs(each - scores[OURS]).max())
        if not far <= _FAR:
            raise TandemError(f"{name} scores otherwise, by {far:.3g}: it is no baseline")
