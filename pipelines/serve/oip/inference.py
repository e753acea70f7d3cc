"""What the open inference protocol asks of the server, without a transport."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.serve.oip.tensors import Output, check_tensors
from pipelines.serve.service import Service
from trainer.log.encoders.encoder import Encoder
from trainer.serving import arrow_body
from trainer.serving.call import JSON, Call, media_type_of
from trainer.serving.known_names import KEYS, check_keys
from trainer.serving.request import Needs, Part, RequestError
from trainer.serving.tensor_body import LENGTHS, decode_tensors, tensors_of

BODY = "body"
PLATFORM = "tandemrec"
Parameter = bool | int | float | str


@dataclass(frozen=True)
class Inference:
    """A call: one request as tensors, or one body of several requests.

    Attributes:
        tensors: flat values by name; parameters: of the call.
        outputs: the tensors that the answer shall have; empty: all.
        deadline: by `time.monotonic`; None: as the server's settings say.
        hold: see `trainer.serving.call.Call`.
    """

    model: str
    version: str
    tensors: Mapping[str, pa.Array]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    deadline: float | None = None
    hold: Callable[[int], None] | None = None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the model: -1 in its shape is any number."""

    name: str
    datatype: str
    shape: tuple[int, ...] = (-1,)


class OpenInference:
    """Answers the calls of the protocol from a service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.model = service.settings.inference.model

    @property
    def version(self) -> str:
        """Of the snapshot in use."""
        return self.service.versions.scorer.version

    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.service.problem() is None

    def check_model(self, name: str, version: str) -> None:
        """Raises RequestError (404) for another model than the one that is served, or another version."""
        if name != self.model:
            raise RequestError(404, f"no model {name[:80]!r}; this server has {self.model!r}")
        if version not in ("", self.version):
            raise RequestError(404, f"version {version[:80]!r} is not served; {self.version!r} is")

    def inputs(self) -> list[TensorInfo]:
        """The tensors of a request; those that the snapshot does not need may be left out."""
        needs = self.service.versions.scorer.needs
        found = [
            TensorInfo("request_timestamp", "INT64", (1,)),
            TensorInfo("user_id", "INT64", (1,)),
            TensorInfo("history_timestamp", "INT64"),
        ]
        if needs.clusters:
            found += [TensorInfo("cluster_size", "INT64"), TensorInfo("cluster_time", "INT64")]
        for part in (needs.history, needs.candidates, needs.context):
            found += _of_part(part, needs)
        found += [TensorInfo(f"{needs.numeric.prefix}{name}", "FP32") for name in needs.numeric.known]
        return [*found, TensorInfo(BODY, "BYTES", (1,))]

    def outputs(self) -> list[TensorInfo]:
        """The tensors of an answer."""
        found = [TensorInfo(f"score_{task}", "FP32") for task in self.service.versions.scorer.tasks]
        found += [TensorInfo(name, "INT64", (1,)) for name in ("history_used", "unknown")]
        return [*found, TensorInfo(BODY, "BYTES", (1,))]

    async def infer(self, call: Inference) -> tuple[str, list[Output]]:
        """The version that scored, and the tensors of the answer.

        Raises:
            RequestError: see `ScoringCore.score`; 404 for another model, 422 for tensors that are no request.
        """
        self.check_model(call.model, call.version)
        check_keys(call.parameters, "the parameters")
        # Each is a copy of all scores.
        check_tensors(call.outputs)
        return await (self._body(call) if BODY in call.tensors else self._tensors(call))

    async def _tensors(self, call: Inference) -> tuple[str, list[Output]]:
        service = self.service
        scorer, core = service.versions.scorer, service.core
        asked = {name: _spelled(call.parameters[name]) for name in KEYS if name in call.parameters}
        given = call.tensors, asked, scorer, service.versions.histories, service.limits
        body = await core.in_thread(decode_tensors, *given)
        (answer,) = await core.answers(body, call.deadline, call.hold)
        found = tensors_of(answer, scorer.tasks)
        unknown = [name for name in call.outputs if name not in found]
        if unknown:
            raise RequestError(422, f"no output {unknown[0][:80]!r}; there are {', '.join(found)}")
        return scorer.version, [Output(name, found[name]) for name in call.outputs or found]

    async def _body(self, call: Inference) -> tuple[str, list[Output]]:
        """A whole body of POST /score in a tensor."""
        bodies = call.tensors[BODY]
        if len(call.tensors) != 1 or len(bodies) != 1 or not pa.types.is_large_binary(bodies.type):
            problem = "must be one value of data type BYTES, and the only tensor"
            raise RequestError(422, f"tensor {BODY}: {problem}")
        content_type = media_type_of(_spelled(call.parameters.get("content_type", JSON)))
        as_arrow = arrow_body.MEDIA_TYPE in _spelled(call.parameters.get("accept", ""))
        content = memoryview(bodies[0].as_buffer())
        if len(content) > self.service.limits.body:
            problem = f"the body is longer than {self.service.limits.body:,} bytes (limits.body)"
            raise RequestError(413, problem)
        reply = await self.service.core.score(Call(content, content_type, as_arrow, call.deadline, call.hold))
        return reply.version, [Output(BODY, reply.content)]


def _of_part(part: Part, needs: Needs) -> list[TensorInfo]:
    """The tensors of one part of a request."""
    found = []
    for name in part.known:
        encoder: Encoder | None = needs.encoders.get(name)
        tensor = TensorInfo(f"{part.prefix}{name}", "INT64" if encoder is None else "FP64")
        found.append(tensor)
        if name in needs.multi and part is not needs.context:
            found.append(TensorInfo(f"{tensor.name}{LENGTHS}", "INT64"))
    return found


def _spelled(parameter: Parameter) -> str:
    """As the metadata of an Arrow body spells it."""
    return str(parameter).lower() if isinstance(parameter, bool) else str(parameter)
