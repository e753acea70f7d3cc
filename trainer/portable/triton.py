"""A repository of models for NVIDIA's Triton Inference Server, from a portable model in ONNX.

OUT/scorer/1/model.onnx        the whole scorer by Triton's ONNX Runtime backend: padded tensors
OUT/requests/1/model.py        one request a call, without padding; calls that wait together are padded
                               and scored by `scorer` at once (Python backend, numpy alone)
OUT/<model>/config.pbtxt       names, types and dimensions of each
"""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from embeddings.errors import ConfigError
from trainer.portable.folder import PortableManifest
from trainer.portable.onnx_model import shared
from trainer.portable.signature import REQUESTS, Axis, PortTensor, Signature

SCORER, FRONT = "scorer", "requests"
NAMES = (SCORER, FRONT)
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL"}
# What the front fills in, since a request has no padding.
LENGTHS = ("history_length", "candidate_length")


def check(form: str) -> None:
    """Raises:
    ConfigError: of this format there is no repository.
    """
    if form != "onnx":
        raise ConfigError(f"a Triton repository is made of a model in onnx, not {form}: see --format")


def write(out: Path, folder: Path, manifest: PortableManifest, signature: Signature) -> None:
    """Write the repository into the empty folder `out`.

    Raises:
        ConfigError: the portable model is not in ONNX.
    """
    check(manifest.form)
    version = out / SCORER / "1"
    version.mkdir(parents=True)
    for entry in manifest.files:
        if entry.path == manifest.model or entry.path.startswith("tables/"):
            to = version / entry.path
            to.parent.mkdir(exist_ok=True)
            shared(folder / entry.path, to)
    inputs, outputs = signature.inputs, signature.outputs
    (out / SCORER / "config.pbtxt").write_text(_config(SCORER, "onnxruntime_onnx", inputs, outputs))
    (out / FRONT / "1").mkdir(parents=True)
    front = [_without_requests(each) for each in inputs if each.name not in LENGTHS]
    given = [_without_requests(each) for each in outputs]
    (out / FRONT / "config.pbtxt").write_text(_config(FRONT, "python", front, given))
    program = importlib.resources.files("trainer.portable").joinpath("triton_requests.py")
    (out / FRONT / "1" / "model.py").write_text(program.read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copyfile(folder / "signature.json", out / FRONT / "1" / "signature.json")


def _without_requests(each: PortTensor) -> PortTensor:
    axes = tuple(axis for axis in each.axes if axis.name != REQUESTS)
    # Triton has no tensor without dimensions.
    return each.model_copy(update={"axes": axes or (Axis(name="one", least=1, most=1),)})


def _config(name: str, backend: str, inputs: Sequence[PortTensor], outputs: Sequence[PortTensor]) -> str:
    """The configuration, in protocol buffers' text form."""
    kind = f'platform: "{backend}"' if backend.startswith("onnx") else f'backend: "{backend}"'
    lines = [f'name: "{name}"', kind, "max_batch_size: 0"]
    for field, tensors in (("input", inputs), ("output", outputs)):
        lines += [f"{field} [", ",\n".join(_entries(tensors)), "]"]
    return "\n".join([*lines, "instance_group [ { kind: KIND_CPU } ]", ""])


def _entries(tensors: Iterable[PortTensor]) -> Iterable[str]:
    for each in tensors:
        dims = ", ".join(str(axis.least if axis.fixed else -1) for axis in each.axes)
        yield f'  {{ name: "{each.name}", data_type: {_TYPES[each.dtype]}, dims: [ {dims} ] }}'
