"""The open inference protocol over gRPC, in the event loop of the server."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from pipelines.serve.load import Hold
from pipelines.serve.oip import inference_pb2
from pipelines.serve.oip.inference import PLATFORM, Inference, OpenInference, Parameter, TensorInfo
from pipelines.serve.oip.tensors import Output, Shaped, check_tensors, typed_field
from pipelines.serve.service import Service
from trainer.ranks.machine import installed
from trainer.serving.request import RequestError

SERVICE, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
# HTTP status of an error -> code.
_CODES = {
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_SERVING, _NOT_SERVING = 1, 2
# Its messages are made when it is imported, which a type checker does not see.
pb: Any = inference_pb2
Context = Any


class GrpcServer:
    """Listens once it is started.

    Attributes:
        port: where, once it is started.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._inference = service, OpenInference(service)
        self.port = 0
        self._server: Any = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port is taken.
        """
        settings = self._service.settings
        own = settings.grpc
        options = [
            ("grpc.max_receive_message_length", own.body),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_allowed_incoming_connections", own.connections),
            ("grpc.max_connection_idle_ms", int(1000 * own.idle_seconds)),
            ("grpc.server_handshake_timeout_ms", int(1000 * settings.http.client_seconds)),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=own.calls)
        self._server.add_generic_rpc_handlers(self._handlers())
        host = f"[{settings.http.host}]" if ":" in settings.http.host else settings.http.host
        try:
            self.port = self._server.add_insecure_port(f"{host}:{own.port}")
        except RuntimeError as error:
            raise OSError(str(error)) from None
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Take no more calls; those under way have so many seconds."""
        await self._server.stop(seconds)

    def _handlers(self) -> list[Any]:
        calls: Mapping[str, tuple[Any, Callable[[Any, Context], Awaitable[Any]]]] = {
            "ServerLive": (pb.ServerLiveRequest, self._live),
            "ServerReady": (pb.ServerReadyRequest, self._ready),
            "ModelReady": (pb.ModelReadyRequest, self._model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self._server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self._model_metadata),
            "ModelInfer": (pb.ModelInferRequest, self._infer),
        }
        methods = {name: self._method(name, *call) for name, call in calls.items()}
        health = {"Check": self._method("Check", pb.HealthCheckRequest, self._check)}
        return [
            grpc.method_handlers_generic_handler(SERVICE, methods),
            grpc.method_handlers_generic_handler(HEALTH, health),
        ]

    def _method(self, name: str, kind: Any, work: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        # A stream of one message is the same on the wire as that message alone. A handler of a single message
        # would be called once it is there, and so could not end the wait for one that never comes.
        return grpc.stream_unary_rpc_method_handler(
            partial(self._counted, name, work), kind.FromString, lambda answer: answer.SerializeToString()
        )

    async def _counted(
        self,
        name: str,
        work: Callable[[Any, Context], Awaitable[Any]],
        requests: AsyncIterator[Any],
        context: Context,
    ) -> Any:
        """The answer; every error is a code and one line, and every call is counted by its code."""
        count = self._service.metrics.grpc_calls.labels
        try:
            answer = await work(await self._message(requests), context)
        except RequestError as error:
            code = _CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
            count(name, code.name).inc()
            trailing: tuple[tuple[str, str], ...] = ()
            if error.retry_after:
                trailing = (("grpc-retry-pushback-ms", str(1000 * error.retry_after)),)
            await context.abort(code, str(error), trailing)
        except asyncio.CancelledError:
            count(name, grpc.StatusCode.CANCELLED.name).inc()
            self._service.metrics.disconnects.inc()
            raise
        except Exception as error:
            count(name, grpc.StatusCode.INTERNAL.name).inc()
            self._service.log.failure("internal error", f"a gRPC call of {name} failed", error)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; see the server's log")
        count(name, grpc.StatusCode.OK.name).inc()
        return answer

    async def _message(self, requests: AsyncIterator[Any]) -> Any:
        """The message of a call.

        Raises:
            RequestError: 408 where it does not come in time, 422 where there is none, or another.
        """
        seconds = self._service.load.seconds
        try:
            async with asyncio.timeout(seconds):
                async for request in requests:
                    return request
        except DecodeError:
            raise RequestError(422, "the message is not the one of this call") from None
        except TimeoutError:
            raise RequestError(408, f"the message did not arrive within {seconds:g} s") from None
        raise RequestError(422, "the call has no message")

    async def _live(self, request: Any, context: Context) -> Any:
        return pb.ServerLiveResponse(live=self._service.live())

    async def _ready(self, request: Any, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=self._inference.ready())

    async def _model_ready(self, request: Any, context: Context) -> Any:
        self._inference.check_model(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._inference.ready())

    async def _check(self, request: Any, context: Context) -> Any:
        if request.service not in ("", SERVICE):
            raise RequestError(404, f"no service {request.service[:80]!r}; there is {SERVICE}")
        return pb.HealthCheckResponse(status=_SERVING if self._inference.ready() else _NOT_SERVING)

    async def _server_metadata(self, request: Any, context: Context) -> Any:
        return pb.ServerMetadataResponse(name=PLATFORM, version=installed("tandemrec") or "", extensions=[])

    async def _model_metadata(self, request: Any, context: Context) -> Any:
        self._inference.check_model(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[self._inference.version],
            platform=PLATFORM,
            inputs=map(_described, self._inference.inputs()),
            outputs=map(_described, self._inference.outputs()),
        )

    async def _infer(self, request: Any, context: Context) -> Any:
        left = context.time_remaining()
        deadline = None if left is None or math.isinf(left) else time.monotonic() + left
        hold = Hold(self._service.in_flight)
        try:
            # What came is held once by gRPC and once as tensors.
            size = request.ByteSize()
            hold.resize(size)
            if size <= self._service.settings.batching.inline:
                tensors, parameters = _read(request)
            else:
                tensors, parameters = await self._service.core.in_thread(_read, request)
            outputs = [wanted.name for wanted in request.outputs]
            call = Inference(
                request.model_name, request.model_version, tensors, parameters, outputs, deadline, hold.resize
            )
            headers = dict(context.invocation_metadata())
            with self._service.traced(f"{SERVICE}/ModelInfer", headers):
                version, found = await self._inference.infer(call)
        finally:
            hold.release()
        return _answer(request, version, found)


def _read(request: Any) -> tuple[dict[str, Any], dict[str, Parameter]]:
    """The tensors and parameters of a call."""
    tensors, parameters = _tensors(request), _parameters(request.parameters)
    for given in request.inputs:
        parameters |= _parameters(given.parameters)
    return tensors, parameters


def _tensors(request: Any) -> dict[str, Any]:
    """Values by name, from raw bytes or from typed lists."""
    check_tensors([given.name for given in request.inputs])
    raw, found = request.raw_input_contents, dict[str, Any]()
    if raw and len(raw) != len(request.inputs):
        problem = f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs"
        raise RequestError(422, problem)
    for place, given in enumerate(request.inputs):
        shaped = Shaped(given.name, given.datatype, given.shape)
        if raw:
            found[given.name] = shaped.of_bytes(raw[place])
        else:
            kept = typed_field(given.datatype)
            found[given.name] = shaped.of_values(list(getattr(given.contents, kept)) if kept else [])
    return found


def _parameters(given: Mapping[str, Any]) -> dict[str, Parameter]:
    kinds = {name: value.WhichOneof("parameter_choice") for name, value in given.items()}
    return {name: getattr(given[name], kind) for name, kind in kinds.items() if kind is not None}


def _answer(request: Any, version: str, outputs: list[Output]) -> Any:
    answer = pb.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
    for output in outputs:
        answer.outputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        answer.raw_output_contents.append(output.raw())
    return answer


def _described(tensor: TensorInfo) -> Any:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
    )
