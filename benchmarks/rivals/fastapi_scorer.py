"""A scorer behind FastAPI as one writes it in an hour: the same weights, one request a call, no checks.

    python -m benchmarks.rivals.fastapi_scorer torch SNAPSHOT
    python -m benchmarks.rivals.fastapi_scorer scorer SNAPSHOT
    python -m benchmarks.rivals.fastapi_scorer onnx PORTABLE

It scores on the event loop, on one thread: with one core there is nothing quicker for a request alone. It has
no deadlines, no limits, no batches, no versions and no time-outs.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.inputs.served_model import FEATURE
from benchmarks.rivals.serving_programs import PlainProgram
from trainer.log.bags import Bags
from trainer.serving.request import History as PastBehaviors
from trainer.serving.request import Request
from trainer.serving.scorer import Scorer
from trainer.snapshot import load_snapshot

Ids = npt.NDArray[np.int64]
# History (oldest first), its times, the time of the request, candidates -> probabilities.
Score = Callable[[Ids, Ids, int, Ids], npt.NDArray[np.float32]]


class History(BaseModel):
    """Behaviors, oldest first."""

    timestamp: list[int]
    features: dict[str, list[int]]


class OneRequest(BaseModel):
    """A user's request."""

    history: History
    time: int
    candidates: dict[str, list[int]]


class ScoreBody(BaseModel):
    """A body as `tandemrec serve` takes it."""

    requests: list[OneRequest]


def torch_scorer(version: Path) -> Score:
    """Plain PyTorch over the tables of a snapshot."""
    snapshot = load_snapshot(version)
    model = snapshot.model
    # Copies: rows of a mapped file would be read in another way.
    tables = {name: next(iter(each.tables().values())).clone() for name, each in model.collections.items()}
    plain = PlainProgram(
        tables["attention"], tables["representation"], model, snapshot.manifest.config.model.k
    )

    def score(history: Ids, times: Ids, now: int, candidates: Ids) -> npt.NDArray[np.float32]:
        seen = history[: int(np.searchsorted(times, now))]
        with torch.inference_mode():
            found = plain(torch.from_numpy(seen[::-1].copy()), torch.from_numpy(candidates))
        return found.numpy()

    return score


def onnx_scorer(portable: Path) -> Score:
    """ONNX Runtime over what `export --format onnx` wrote."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        portable / "model.onnx", options, providers=["CPUExecutionProvider"]
    )

    def score(history: Ids, times: Ids, now: int, candidates: Ids) -> npt.NDArray[np.float32]:
        given = {
            "history_length": np.array([history.size]),
            "history_timestamp": times[None],
            "request_timestamp": np.array([now]),
            "candidate_length": np.array([candidates.size]),
            f"history_{FEATURE}": history[None],
            f"candidate_{FEATURE}": candidates[None],
        }
        (found,) = session.run(None, given)
        probabilities: npt.NDArray[np.float32] = found[0, :, 0]
        return probabilities

    return score


def our_scorer(version: Path) -> Score:
    """The scorer of `tandemrec serve`: what is left of a difference to it is the server around it."""
    scorer = Scorer(load_snapshot(version))
    nothing: dict[str, Bags] = {}

    def score(history: Ids, times: Ids, now: int, candidates: Ids) -> npt.NDArray[np.float32]:
        past, shown = PastBehaviors(times, {FEATURE: Bags(history)}), {FEATURE: Bags(candidates)}
        answers, _ = scorer.score([Request(0, past, now, shown, candidates.size, nothing)])
        probabilities: npt.NDArray[np.float32] = answers[0].probabilities[:, 0]
        return probabilities

    return score


SCORERS: dict[str, Callable[[Path], Score]] = {
    "torch": torch_scorer, "onnx": onnx_scorer, "scorer": our_scorer,
}  # fmt: skip


def build_app(score: Score) -> FastAPI:
    """One path."""
    app = FastAPI()

    @app.post("/score")
    async def score_body(body: ScoreBody) -> dict[str, Any]:
        results = []
        for request in body.requests:
            ids = np.array(request.history.features[FEATURE], dtype=np.int64)
            times = np.array(request.history.timestamp, dtype=np.int64)
            candidates = np.array(request.candidates[FEATURE], dtype=np.int64)
            found = score(ids, times, request.time, candidates)
            results.append({"scores": {"click": found.tolist()}})
        return {"version": "v00000001", "results": results}

    return app


def main() -> None:
    torch.set_num_threads(1)
    score = SCORERS[sys.argv[1]](Path(sys.argv[2]))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        print(f"serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        config = uvicorn.Config(build_app(score), log_level="error", access_log=False)
        uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
