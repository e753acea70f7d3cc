"""The open inference protocol over HTTP, in JSON: the same calls as over gRPC, under /v2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from pipelines.serve.bodies import errors_of
from pipelines.serve.http_body import HeldAnswer, read_body
from pipelines.serve.load import Hold
from pipelines.serve.oip.inference import PLATFORM, Inference, OpenInference, Parameter
from pipelines.serve.oip.tensors import Output, Shaped, check_tensors, flat
from pipelines.serve.scoring import deadline_of
from pipelines.serve.service import Service
from trainer.config.mistakes import path_in, words_of
from trainer.ranks.machine import installed
from trainer.serving.call import JSON
from trainer.serving.json_body import parsed_json
from trainer.serving.request import RequestError

_ERRORS = errors_of(400, 404, 408, 413, 415, 422, 429, 503, 504)
Parameters = dict[str, bool | int | float | str]


class _Body(BaseModel):
    # Further keys are those of a newer protocol, or of one server.
    model_config = ConfigDict(frozen=True)


class InputBody(_Body):
    """A tensor of a request: `shape` is [n] or [1, n]; `data` is a list of values."""

    name: str
    datatype: str
    shape: Annotated[list[int], Field(fail_fast=True, max_length=8)]
    data: Annotated[list[Any], Field(fail_fast=True)]
    parameters: Parameters = Field(default_factory=dict)


class WantedBody(_Body):
    """A tensor that the answer shall have."""

    name: str
    parameters: Parameters = Field(default_factory=dict)


class InferBody(_Body):
    """A call of the model."""

    inputs: Annotated[list[InputBody], Field(fail_fast=True, min_length=1)]
    outputs: Annotated[list[WantedBody], Field(fail_fast=True)] = Field(default_factory=list)
    parameters: Parameters = Field(default_factory=dict)
    id: str = ""


class OutputBody(BaseModel):
    """A tensor of an answer."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferredBody(BaseModel):
    """The answer of the model."""

    model_name: str
    model_version: str
    id: str
    outputs: list[OutputBody]


class ServerBody(BaseModel):
    """The server, and what it can besides the protocol."""

    name: str
    version: str
    extensions: list[str]


class TensorBody(BaseModel):
    """A tensor of the model: -1 in its shape is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelBody(BaseModel):
    """The model and its tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorBody]
    outputs: list[TensorBody]


class AliveBody(BaseModel):
    """Whether the server works."""

    live: bool


class AbleBody(BaseModel):
    """Whether requests should be sent here."""

    ready: bool


class NamedAbleBody(AbleBody):
    """Whether the model may be asked."""

    name: str


def add_inference(app: FastAPI, service: Service) -> None:
    """The paths of the protocol, without and with a version."""
    inference = OpenInference(service)
    _add_server(app, service)
    _add_model(app, service, inference)
    _add_infer(app, service, inference)


def _add_server(app: FastAPI, service: Service) -> None:

    @app.get("/v2", response_model=ServerBody)
    async def server() -> ServerBody:
        """The server."""
        return ServerBody(name=PLATFORM, version=installed("tandemrec") or "", extensions=[])

    @app.get("/v2/health/live", response_model=AliveBody, responses=errors_of(503))
    async def live() -> AliveBody:
        """Whether the process works."""
        if not service.live():
            raise RequestError(503, service.problem() or "")
        return AliveBody(live=True)

    @app.get("/v2/health/ready", response_model=AbleBody, responses=errors_of(503))
    async def ready() -> AbleBody:
        """Whether requests should be sent here."""
        _check_ready(service)
        return AbleBody(ready=True)


def _add_model(app: FastAPI, service: Service, inference: OpenInference) -> None:
    @app.get("/v2/models/{name}", response_model=ModelBody, responses=errors_of(404, 422))
    @app.get("/v2/models/{name}/versions/{version}", response_model=ModelBody, responses=errors_of(404, 422))
    async def model(name: str, version: str = "") -> ModelBody:
        """The model's tensors."""
        inference.check_model(name, version)
        return ModelBody.model_validate(
            {
                "name": name,
                "versions": [inference.version],
                "platform": PLATFORM,
                "inputs": [asdict(tensor) for tensor in inference.inputs()],
                "outputs": [asdict(tensor) for tensor in inference.outputs()],
            }
        )

    able = errors_of(404, 422, 503)

    @app.get("/v2/models/{name}/ready", response_model=NamedAbleBody, responses=able)
    @app.get("/v2/models/{name}/versions/{version}/ready", response_model=NamedAbleBody, responses=able)
    async def model_ready(name: str, version: str = "") -> NamedAbleBody:
        """Whether the model may be asked."""
        inference.check_model(name, version)
        _check_ready(service)
        return NamedAbleBody(name=name, ready=True)


def _add_infer(app: FastAPI, service: Service, inference: OpenInference) -> None:
    schema = {"required": True, "content": {JSON: {"schema": InferBody.model_json_schema()}}}
    given: dict[str, Any] = {"response_model": InferredBody, "responses": _ERRORS}
    given["openapi_extra"] = {"requestBody": schema}

    @app.post("/v2/models/{name}/infer", **given)
    @app.post("/v2/models/{name}/versions/{version}/infer", **given)
    async def infer(request: Request, name: str, version: str = "") -> Response:
        """Score the candidates of one request, given as tensors."""
        hold = Hold(service.in_flight)
        try:
            with service.traced("POST /v2/models/{name}/infer", request.headers):
                return await _answer(request, service, inference, hold, (name, version))
        except BaseException:
            hold.release()
            raise


def _check_ready(service: Service) -> None:
    if (problem := service.problem()) is not None:
        raise RequestError(503, problem)


async def _answer(
    request: Request, service: Service, inference: OpenInference, hold: Hold, model: tuple[str, str]
) -> Response:
    deadline = deadline_of(request)
    if "inference-header-content-length" in request.headers:
        raise RequestError(415, "tensors in binary are read over gRPC; over HTTP send them in JSON")
    content = await read_body(request, service.limits, hold, service.load.seconds)
    given, tensors = await service.core.in_thread(_read, content, service)
    parameters: dict[str, Parameter] = {**given.parameters}
    for tensor in given.inputs:
        parameters |= tensor.parameters
    outputs = [wanted.name for wanted in given.outputs]
    call = Inference(*model, tensors, parameters, outputs, deadline, hold.resize)
    version, found = await inference.infer(call)
    answer = {"model_name": model[0], "model_version": version, "id": given.id}
    written = to_json({**answer, "outputs": [_listed(output) for output in found]})
    hold.resize(len(written))
    return HeldAnswer(written, hold, JSON)


def _read(content: memoryview, service: Service) -> tuple[InferBody, Mapping[str, Any]]:
    """The call and its tensors.

    Raises:
        RequestError: 413 above a limit; 422 naming the place of the first mistake.
    """
    tree = parsed_json(content, service.limits, "inputs", "outputs")
    try:
        given = InferBody.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place, problem = path_in(tree, first["loc"])[:200], words_of(dict(first), json=True)
        raise RequestError(422, f"{place}: {problem}"[:500] if place else problem[:300]) from None
    check_tensors([tensor.name for tensor in given.inputs])
    found = dict[str, Any]()
    for tensor in given.inputs:
        values = flat(tensor.data)
        if tensor.datatype == "BYTES":
            values = [value.encode() if isinstance(value, str) else value for value in values]
        found[tensor.name] = Shaped(tensor.name, tensor.datatype, tensor.shape).of_values(values)
    return given, found


def _listed(output: Output) -> dict[str, Any]:
    return {
        "name": output.name,
        "datatype": output.datatype,
        "shape": output.shape,
        "data": output.listed(),
    }
