"""What the TorchX component asks a scheduler to run."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from torchx import specs
from torchx.specs.file_linter import validate

from launch import components
from launch.components import JobShape, parse_shape, train


def _command(app: specs.AppDef) -> str:
    """The shell line as a node gets it, after TorchX filled in its macros."""
    values = specs.macros.Values(img_root="", app_id="job-1", replica_id="0", rank0_env="THE_RANK0_HOST")
    role = values.apply(app.roles[0])
    assert role.entrypoint == "bash"
    assert role.args[0] == "-c"
    return str(role.args[1])


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("2", JobShape(1, 1, 2)),
        ("1x2", JobShape(1, 1, 2)),
        ("4x8", JobShape(4, 4, 8)),
        ("2:4x8", JobShape(2, 4, 8)),
    ],
)
def test_shape(text: str, shape: JobShape) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize(
    "text", ["", "x", "1x", "x2", "0x2", "1x0", "-1x2", "3:2x1", "0:2x1", "2:4", "1x2x3"]
)
def test_wrong_shape_says_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="-j"):
        parse_shape(text)


def test_one_node() -> None:
    app = train("--set", "train.max_steps=3", config="c.toml", out="runs/a", j="1x2", max_restarts=3)
    words = shlex.split(_command(app))
    assert words[:4] == ["exec", "python", "-m", "torch.distributed.run"]
    assert {"--standalone", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=3"} <= set(words)
    tail = "-m launch.cli train --config c.toml --out runs/a --set train.max_steps=3"
    assert words[-len(tail.split()) :] == tail.split()
    assert not [word for word in words if "tee" in word or "rdzv" in word]
    assert (app.name, app.roles[0].num_replicas) == ("tandemrec", 1)


def test_several_nodes_meet_on_rank_0() -> None:
    app = train(config="c.toml", out="/shared/a", j="2:4x8", rdzv_port=29600, gpu=8, cpu=96)
    words = shlex.split(_command(app))
    assert {"--nnodes=2:4", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-id=job-1"} <= set(words)
    assert "--rdzv-endpoint=${THE_RANK0_HOST:=localhost}:29600" in words
    assert "--standalone" not in words
    role = app.roles[0]
    assert (role.num_replicas, role.min_replicas, role.port_map) == (4, 2, {"c10d": 29600})
    assert (role.resource.gpu, role.resource.cpu) == (8, 96)


@pytest.mark.parametrize(("host", "expected"), [("node-7", "node-7:29500"), ("", "localhost:29500")])
def test_endpoint_is_expanded_by_the_shell(host: str, expected: str) -> None:
    line = _command(train(config="c", out="o", j="2x1")).replace("exec python -m", "printf '%s\\n'")
    shell = subprocess.run(
        ["bash", "-c", line], env={"THE_RANK0_HOST": host}, capture_output=True, text=True, check=True
    )
    assert f"--rdzv-endpoint={expected}" in shell.stdout.splitlines()


@pytest.mark.parametrize(
    "value", ["a b", "it's", '"', "$HOME", "${app_id}", "$$", "`id`", "; touch x", "*", "\\", "", "ü"]
)
def test_arguments_reach_the_trainer_as_they_are(value: str) -> None:
    app = train("--set", f"data.log={value}", config=value, out="o")
    line = _command(app).replace("exec python -m", "printf '%s\\n'")
    shell = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    words = shell.stdout.splitlines()
    assert words[-1] == f"data.log={value}"
    assert words[words.index("--config") + 1] == value


def test_threads_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(**options: object) -> str:
        return str(train(config="c", out="o", **options).roles[0].env["OMP_NUM_THREADS"])  # type: ignore[arg-type]

    monkeypatch.setattr(components, "_cores", lambda: 12)
    assert threads(j="1x4") == "3"
    assert threads(j="1x16") == "1"
    assert threads(j="1x2", cpu=8) == "4"
    assert threads(j="1x2", threads=5) == "5"
    assert threads(j="1x2", env={"OMP_NUM_THREADS": "7"}) == "7"


def test_no_restarts_unless_asked() -> None:
    assert "--max-restarts=0" in _command(train(config="c", out="o"))


def test_torchx_accepts_the_signature() -> None:
    assert validate(str(Path(components.__file__)), "train") == []
