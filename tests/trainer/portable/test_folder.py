"""A portable model in ONNX: its folder, ONNX Runtime's scores, and the repository for Triton."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from embeddings.errors import ConfigError, SnapshotError
from pipelines.export_portable import (
    PortableOptions,
    check_portable,
    export_portable,
    write_repository,
)
from pipelines.export_version import ExportOptions
from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.models import small_log
from tests.helpers.snapshots import exported, save_run
from trainer.portable.folder import read, read_recorded
from trainer.portable.triton import FRONT, LENGTHS, SCORER


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return exported(
        save_run(folder / "run", small_log(folder / "log"), "dare", "model.hidden=[8]"), folder / "snap"
    )


@pytest.fixture(scope="module")
def model(version: Path) -> Path:
    """Tables beside the model, compared on a split too."""
    options = PortableOptions("onnx", inside=0, split="train", requests=6)
    return export_portable(None, version, version.parent / "portable", options, ExportOptions())


def test_onnx_runtime_alone_gives_the_scores(model: Path, version: Path) -> None:
    manifest, signature = read(model)
    inputs, expected = read_recorded(model, signature)
    session = onnxruntime.InferenceSession(str(model / "model.onnx"))
    assert [each.name for each in session.get_inputs()] == signature.names
    for given, described in zip(session.get_inputs(), signature.inputs, strict=True):
        assert given.shape == [axis.least if axis.fixed else axis.name for axis in described.axes]
        assert given.type == f"tensor({described.dtype})".replace("float32", "float")
    assert np.abs(session.run(None, inputs)[0] - expected).max() <= 1e-6
    assert manifest.worst <= 1e-6 and set(manifest.aucs) == {"click"}
    # The tables are the snapshot's own files.
    for file in (model / "tables").iterdir():
        assert file.samefile(version / "tables" / file.name)
    page = (model / "README.md").read_text()
    assert "session.run(None, recorded)" in page and "| 0 or more | none | candidates of each" in page


def test_the_dense_part_is_run_by_its_names(model: Path) -> None:
    session = onnxruntime.InferenceSession(str(model / read(model)[0].dense))
    given = {
        each.name: np.zeros([2 if size == "candidates" else size for size in each.shape], dtype)
        for each in session.get_inputs()
        for dtype in [{"tensor(float)": np.float32, "tensor(int64)": np.int64}.get(each.type, np.bool_)]
    }
    assert session.run(None, given)[0].shape == (2, 1)


def test_a_changed_file_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_portable(model)
    assert "recorded requests score as at export" in capsys.readouterr().out
    file = model / "recorded.npz"
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-1] + b"x")
        with pytest.raises(SnapshotError, match=r"recorded\.npz: does not match the manifest"):
            check_portable(model)
    finally:
        file.write_bytes(before)
    with pytest.raises(SnapshotError, match="no portable model here"):
        check_portable(tmp_path)


class _Tensor:
    def __init__(self, name: str, content: Any) -> None:
        self.name, self.content = name, content

    def as_numpy(self) -> Any:
        return self.content


def _triton(session: onnxruntime.InferenceSession) -> ModuleType:
    """What Triton gives a Python model, as far as this one uses it."""
    found: Any = ModuleType("triton_python_backend_utils")

    class InferenceRequest:
        def __init__(self, model_name: str, requested_output_names: list[str], inputs: list[_Tensor]) -> None:
            assert model_name == SCORER
            self.names, self.inputs = requested_output_names, {each.name: each.content for each in inputs}

        def exec(self) -> Any:
            (scores,) = session.run(self.names, self.inputs)
            tensors = {self.names[0]: _Tensor(self.names[0], scores)}
            return SimpleNamespace(has_error=lambda: False, tensors=tensors)

    found.Tensor, found.InferenceRequest, found.TritonError = _Tensor, InferenceRequest, ValueError
    found.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(
        output_tensors=output_tensors, error=error
    )
    found.get_input_tensor_by_name = lambda request, name: request.get(name)
    found.get_output_tensor_by_name = lambda answer, name: answer.tensors[name]
    return found


def test_a_triton_repository_has_the_names_types_and_sizes_of_the_session(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(model, tmp_path / "repository")
    session = onnxruntime.InferenceSession(str(tmp_path / "repository" / SCORER / "1" / "model.onnx"))
    configs = {}
    for name in (SCORER, FRONT):
        config = model_config_pb2.ModelConfig()
        configs[name] = text_format.Parse(
            (tmp_path / "repository" / name / "config.pbtxt").read_text(), config
        )
        assert configs[name].name == name and configs[name].max_batch_size == 0
    kinds = {"tensor(int64)": model_config_pb2.TYPE_INT64, "tensor(float)": model_config_pb2.TYPE_FP32}
    for mine, its in (
        (configs[SCORER].input, session.get_inputs()),
        (configs[SCORER].output, session.get_outputs()),
    ):
        assert [each.name for each in mine] == [each.name for each in its]
        assert [each.data_type for each in mine] == [kinds[each.type] for each in its]
        assert [len(each.dims) for each in mine] == [len(each.shape) for each in its]
    assert {each.name for each in configs[FRONT].input} == {
        each.name for each in session.get_inputs() if each.name not in LENGTHS
    }
    # The front: requests without padding become one padded call.
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", _triton(session))
    place = tmp_path / "repository" / FRONT / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("front", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    front = module.TritonPythonModel()
    front.initialize({})
    inputs, expected = read_recorded(model, read(model)[1])
    calls, sizes = [], list(zip(inputs["history_length"], inputs["candidate_length"], strict=True))
    for row, (behaviors, candidates) in enumerate(sizes):
        ends = {"history": slice(behaviors), "candidate": slice(candidates)}
        calls.append(
            {
                name: _Tensor(
                    name, part[row][ends[name.split("_")[0]]] if part.ndim > 1 else part[row : row + 1]
                )
                for name, part in inputs.items()
                if name not in LENGTHS
            }
        )
    for row, answer in enumerate(front.execute(calls)):
        scores = answer.output_tensors[0].as_numpy()
        assert scores.shape[0] == sizes[row][1]
        assert np.abs(scores - expected[row, : len(scores)]).max() <= 1e-6
    item = "history_item_id"
    wrong = {
        "the request has no history_timestamp": {},
        "has values outside [0, ": calls[0] | {item: _Tensor(item, calls[0][item].content - 1000)},
        "behaviors, and other inputs have 0": calls[0]
        | {"history_timestamp": _Tensor("history_timestamp", np.zeros(0, dtype=np.int64))},
        "has 0 axes, expected 1": calls[0] | {item: _Tensor(item, np.array(3))},
    }
    for problem, call in wrong.items():
        # A request that is wrong is no error of another one.
        answer, other = front.execute([call, calls[1]])
        assert problem in str(answer.error)
        assert other.error is None
        assert np.abs(other.output_tensors[0].as_numpy() - expected[1, : sizes[1][1]]).max() <= 1e-6


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (PortableOptions("pt2", triton=Path("triton")), "is made of a model in onnx, not pt2"),
        (PortableOptions("onnx", triton=Path("out")), "must lie beside out, not in it"),
        (PortableOptions("onnx", triton=Path("out/triton")), "must lie beside out, not in it"),
        (
            PortableOptions("onnx", log=Path("log"), split="new"),
            "log has no split new; it has train: see --spl",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_made(
    options: PortableOptions, problem: str, version: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "log", {"train": random_rows(3, Shape(users=1))})
    with pytest.raises(ConfigError, match=problem):
        export_portable(None, version, Path("out"), options, ExportOptions())
    assert not Path("out").exists()
