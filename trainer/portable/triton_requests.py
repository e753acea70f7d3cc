"""Triton's Python backend in front of the scorer: calls of one request each become one padded call.

This file is copied into a model repository, where it has numpy and what Triton gives it, and nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]

_TYPES = {"int64": np.int64, "float32": np.float32}
# Inputs of the scorer that follow from the sizes of a request.
_LENGTHS = {"history_length": "behaviors", "candidate_length": "candidates"}


class TritonPythonModel:
    """What Triton calls, by the names that it knows."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the signature of the scorer, which lies beside this file."""
        signature = json.loads((Path(__file__).parent / "signature.json").read_text(encoding="utf-8"))
        self.inputs, self.output = signature["inputs"], signature["outputs"][0]["name"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer a request: its candidates' probabilities, or an error."""
        try:
            given = [self._parts(request) for request in requests]
            padded = [
                pb_utils.Tensor(each["name"], self._padded(each, [parts[each["name"]] for parts in given]))
                for each in self.inputs
            ]
        except ValueError as error:
            failed = pb_utils.TritonError(str(error))
            return [pb_utils.InferenceResponse(output_tensors=[], error=failed) for _ in requests]
        call = pb_utils.InferenceRequest(
            model_name="scorer", requested_output_names=[self.output], inputs=padded
        )
        answer = call.exec()
        if answer.has_error():
            failed = pb_utils.TritonError(answer.error().message())
            return [pb_utils.InferenceResponse(output_tensors=[], error=failed) for _ in requests]
        scores = pb_utils.get_output_tensor_by_name(answer, self.output).as_numpy()
        return [
            pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(self.output, score[: int(parts["candidate_length"])])]
            )
            for score, parts in zip(scores, given, strict=True)
        ]

    def _parts(self, request: Any) -> dict[str, Any]:
        """A request's tensors without the axis of requests, and its lengths."""
        parts: dict[str, Any] = {}
        sizes = {"behaviors": 0, "candidates": 0}
        for each in self.inputs:
            name = each["name"]
            if name in _LENGTHS:
                continue
            found = pb_utils.get_input_tensor_by_name(request, name)
            if found is None:
                raise ValueError(f"the request has no {name}")
            parts[name] = found.as_numpy()
            for axis, size in zip(each["axes"][1:], parts[name].shape, strict=False):
                if axis["name"] not in sizes:
                    continue
                known = sizes[axis["name"]] = sizes[axis["name"]] or size
                if known != size:
                    raise ValueError(f"{name} has {size} {axis['name']}, and other inputs have {known}")
        return parts | {length: np.array(sizes[axis]) for length, axis in _LENGTHS.items()}

    def _padded(self, each: dict[str, Any], parts: list[Any]) -> Any:
        """[requests, ...] with the padding that the signature asks for."""
        padding = -1 if each["padding"].startswith("-1") else 0
        dims = len(each["axes"]) - 1
        parts = [part.reshape(part.shape[:dims]) if dims else part.reshape(()) for part in parts]
        shape = [max(1, *(part.shape[axis] for part in parts)) for axis in range(dims)]
        whole = np.full((len(parts), *shape), padding, dtype=_TYPES[each["dtype"]])
        for row, part in enumerate(parts):
            place: Any = (row, *(slice(size) for size in part.shape))
            whole[place] = part
        return whole
