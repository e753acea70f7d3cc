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
        """One answer a request: its candidates' probabilities, or an error, which is of it alone."""
        answers: list[Any] = [None] * len(requests)
        given: dict[int, dict[str, Any]] = {}
        for place, request in enumerate(requests):
            try:
                given[place] = self._parts(request)
            except ValueError as error:
                answers[place] = _failed(pb_utils.TritonError(str(error)))
        if given:
            for place, answer in zip(given, self._scored(list(given.values())), strict=True):
                answers[place] = answer
        return answers

    def _scored(self, given: list[dict[str, Any]]) -> list[Any]:
        """The answers to some requests, by one call of the scorer."""
        sizes = self._sizes(given)
        padded = [
            pb_utils.Tensor(each["name"], _padded(each, [parts[each["name"]] for parts in given], sizes))
            for each in self.inputs
        ]
        call = pb_utils.InferenceRequest(
            model_name="scorer", requested_output_names=[self.output], inputs=padded
        )
        answer = call.exec()
        if answer.has_error():
            return [_failed(pb_utils.TritonError(answer.error().message())) for _ in given]
        scores = pb_utils.get_output_tensor_by_name(answer, self.output).as_numpy()
        return [
            pb_utils.InferenceResponse(
                output_tensors=[pb_utils.Tensor(self.output, score[: int(parts["candidate_length"])])]
            )
            for score, parts in zip(scores, given, strict=True)
        ]

    def _parts(self, request: Any) -> dict[str, Any]:
        """A request's tensors without the axis of requests, and its lengths.

        Raises:
            ValueError: it is not what the signature says.
        """
        parts: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for each in self.inputs:
            name, axes = each["name"], each["axes"][1:]
            if name in _LENGTHS:
                continue
            found = pb_utils.get_input_tensor_by_name(request, name)
            if found is None:
                raise ValueError(f"the request has no {name}")
            part = found.as_numpy()
            if part.ndim != len(axes) and (axes or part.size != 1):
                raise ValueError(f"{name} has {part.ndim} axes, expected {len(axes) or 'one number'}")
            _check_values(each, part)
            parts[name] = part
            for axis, size in zip(axes, part.shape, strict=False):
                known = sizes.setdefault(axis["name"], size)
                if known != size and not axis["name"].startswith("ids_"):
                    raise ValueError(f"{name} has {size} {axis['name']}, and other inputs have {known}")
                if axis["most"] is not None and size > axis["most"]:
                    raise ValueError(
                        f"{name} has {size} {axis['name']}, the model takes {axis['most']}; give the newest"
                    )
        return parts | {length: np.array(sizes.get(axis, 0)) for length, axis in _LENGTHS.items()}

    def _sizes(self, given: list[dict[str, Any]]) -> dict[str, int]:
        """Axis -> the largest size, at least 1, of all inputs that have it."""
        sizes: dict[str, int] = {}
        for each in self.inputs:
            for place, axis in enumerate(each["axes"][1:]):
                found = (parts[each["name"]].shape[place] for parts in given)
                sizes[axis["name"]] = max(sizes.get(axis["name"], 1), *found)
        return sizes


def _padded(each: dict[str, Any], parts: list[Any], sizes: dict[str, int]) -> Any:
    """[requests, ...] with the padding that the signature asks for."""
    padding = -1 if each["padding"].startswith("-1") else 0
    shape = [sizes[axis["name"]] for axis in each["axes"][1:]]
    whole = np.full((len(parts), *shape), padding, dtype=_TYPES[each["dtype"]])
    for row, part in enumerate(parts):
        # What has no axis comes as one number in a list.
        place: Any = (row, *map(slice, part.shape)) if shape else row
        whole[place] = part if shape else part.item()
    return whole


def _check_values(each: dict[str, Any], part: Any) -> None:
    """Ids outside of a table would be an error of all that are scored together, or read another row."""
    for end, is_outside in (("least", np.less), ("most", np.greater)):
        if each[end] is not None and is_outside(part, each[end]).any():
            raise ValueError(f"{each['name']} has values outside [{each['least']}, {each['most']}]")


def _failed(error: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=error)
