"""Requests of a load test as whole messages, one a file, which the client sends as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks.harness.http_client import request_of
from benchmarks.inputs.served_model import FEATURE, ServedModel, arrow_body, content_types, draw, json_body
from trainer.serving.request import Request


def json_request(request: Request) -> bytes:
    """POST /score in JSON."""
    return request_of("/score", content_types()["json"], json_body(request))


def arrow_request(request: Request) -> bytes:
    """POST /score in Arrow, both ways."""
    arrow = content_types()["arrow"]
    return request_of("/score", arrow, arrow_body(request), f"accept: {arrow}")


def grpc_message(request: Request) -> bytes:
    """ModelInfer of the open inference protocol, one tensor a column."""
    from pipelines.serve.oip import inference_pb2

    tensors = {
        "request_timestamp": np.array([request.time]),
        "history_timestamp": request.history.time,
        f"history_{FEATURE}": request.history.features[FEATURE].values,
        f"candidate_{FEATURE}": request.candidates[FEATURE].values,
    }
    message = inference_pb2.ModelInferRequest(model_name="tandemrec")
    for name, values in tensors.items():
        message.inputs.add(name=name, datatype="INT64", shape=[values.size])
        message.raw_input_contents.append(values.astype("<i8").tobytes())
    content: bytes = message.SerializeToString()
    return content


# Interface -> how its messages are made.
FORMS: dict[str, Callable[[Request], bytes]] = {
    "json": json_request, "arrow": arrow_request, "grpc": grpc_message,
}  # fmt: skip


def write_bodies(
    folder: Path, model: ServedModel, form: str, shape: tuple[int, int], seeds: Iterable[int]
) -> Path:
    """One file a user; `shape`: behaviors and candidates."""
    folder.mkdir(parents=True)
    for number, seed in enumerate(seeds):
        (folder / f"{number:06d}").write_bytes(FORMS[form](draw(model, seed, *shape)))
    return folder
