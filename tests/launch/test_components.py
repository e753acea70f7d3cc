"""What the TorchX component asks a scheduler to run."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser
from torchx import specs
from torchx.runner import get_runner
from torchx.runner.config import get_config
from torchx.specs.file_linter import validate

from launch import components
from launch.cli import app
from launch.components import (
    Job,
    JobError,
    JobShape,
    evaluate,
    export,
    online,
    parse_shape,
    plan,
    train,
    tune,
)
from tests.helpers.launching import ROOT, SETTINGS, launched
from tests.helpers.logs import small_log
from tests.helpers.streams import add_window, rows_of, write_stream

ODD = [
    "a b",
    "it's",
    '"',
    "$HOME",
    "${app_id}",
    "$$",
    "$(HOME)",
    "$$(HOME)",
    "`id`",
    "; touch x",
    "*",
    "\\",
    "",
    "ü",
]


def _command(app: specs.AppDef) -> str:
    """The shell line as a node gets it, after TorchX filled in its macros."""
    values = specs.macros.Values(img_root="", app_id="job-1", replica_id="0", rank0_env="THE_RANK0_HOST")
    role = values.apply(app.roles[0])
    assert role.entrypoint == "bash"
    assert role.args[0] == "-c"
    return str(role.args[1])


def test_more_ranks_than_gpus_are_refused() -> None:
    wanted = {"config": "c.toml", "out": "/shared/a"}
    assert train(**wanted, j="2x4", gpu=8).roles[0].resource.gpu == 8
    assert train(**wanted, j="1x4", gpu=0).roles[0].resource.gpu == 0
    with pytest.raises(JobError, match=r"-j 2x4: a node has 2 GPU\(s\).*--gpu 4, or for -j 2x2"):
        train(**wanted, j="2x4", gpu=2)
    with pytest.raises(JobError, match="NCCL refuses two ranks on one"):
        evaluate(run="/shared/a", j="1x2", gpu=1)


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
    app = train("--set", "train.max_steps=3", config="c.toml", out="runs/a", j="1x2")
    words = shlex.split(_command(app))
    assert words[:4] == ["exec", "python", "-m", "torch.distributed.run"]
    assert {"--standalone", "--nnodes=1", "--nproc-per-node=2", "--max-restarts=0"} <= set(words)
    tail = "-m -- launch.cli train --config c.toml --out runs/a --set train.max_steps=3"
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


@pytest.mark.parametrize("value", ODD)
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


@pytest.mark.parametrize("verb", ["train", "online", "evaluate", "export", "plan"])
def test_torchx_accepts_the_signature_and_every_argument_has_its_help(verb: str) -> None:
    assert validate(str(Path(components.__file__)), verb) == []
    function = getattr(components, verb)
    described = re.findall(r"^ {8}(\w+):", str(function.__doc__), re.MULTILINE)
    assert described == list(inspect.signature(function).parameters)


def test_the_other_verbs() -> None:
    app = evaluate(run="/s/run", split="validation", j="2x4", max_restarts=3)
    words = shlex.split(_command(app))
    assert words[-8:] == ["-m", "--", "launch.cli", "evaluate", "--run", "/s/run", "--split", "validation"]
    assert {"--nnodes=2", "--nproc-per-node=4", "--max-restarts=3"} <= set(words)
    words = shlex.split(_command(evaluate(run="/s/run", device="cpu")))
    assert words[-4:] == ["--split", "test", "--device", "cpu"]
    assert shlex.split(_command(evaluate(run="/s/run", sample=9)))[-2:] == ["--sample", "9"]
    words = shlex.split(_command(evaluate("--checkpoint", "40", run="/s/run")))
    assert words[-4:] == ["--split", "test", "--checkpoint", "40"]
    line = _command(export(run="/s/run", out="/s/snap", device="cuda"))
    assert line == "exec python -m launch.cli export --run /s/run --out /s/snap --device cuda"
    line = _command(export(run="/s/run", out="/s/snap", mounts=["type=bind", "src=/s", "dst=/s"]))
    assert line == "exec python -m launch.cli export --run /s/run --out /s/snap"
    line = _command(export("--dtype", "int8", "--since", "3", run="/s/run", out="/s/snap"))
    assert line == "exec python -m launch.cli export --run /s/run --out /s/snap --dtype int8 --since 3"
    line = _command(plan("--set", "data.log=a b", config="c.toml", world_size=16, hbm="141GB"))
    expected = ["plan", "--config", "c.toml", "--world-size", "16", "--hbm", "141GB", "--set", "data.log=a b"]
    assert shlex.split(line)[4:] == expected


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-j", "foo"], "-j 'foo': write it as NODESxRANKS"),
        (["--mounts", "type=x,src=a"], "--mounts type=x,src=a: invalid mount type 'x'"),
        (["-h", "no_such_machine"], "-h no_such_machine: "),
    ],
)
def test_a_wrong_option_is_a_message_and_no_traceback(words: list[str], problem: str) -> None:
    command = [
        "run",
        "-s",
        "local_cwd",
        "--dryrun",
        "launch/components.py:train",
        "--config",
        "c",
        "--out",
        "o",
    ]
    torchx = [sys.executable, "-c", "from torchx.cli.main import main; main()"]
    done = subprocess.run([*torchx, *command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert problem in done.stderr and "Traceback" not in done.stderr


def _request(scheduler: str, configuration: dict[str, Any], app: specs.AppDef) -> Any:
    with get_runner() as runner:
        return runner.dryrun(app, scheduler, configuration).request


JOB: dict[str, Any] = {
    **{"config": "c.toml", "out": "/s/run", "j": "2x8", "gpu": 8, "cpu": 96, "memMB": 900_000},
    **{"max_restarts": 3, "image": "registry/tandemrec:7"},
}


def test_slurm_gets_gpus_ranks_restarts_and_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The odd words are no overrides.
    monkeypatch.setattr(components, "check_words", lambda words: None)
    app = train(*ODD, **JOB, max_retries=2)
    script = _request("slurm", {"partition": "gpu", "time": "60"}, app).materialize()
    heads = [line for line in script.splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(heads) == 2
    for head in heads:
        wanted = {"--ntasks-per-node=1", "--cpus-per-task=96", "--gpus-per-task=8", "--mem=900000"}
        assert {*wanted, "--requeue", "--partition=gpu", "--time=60"} <= set(head.split())
    assert "export TORCHX_MAX_RETRIES=2" in script
    # Run as Slurm would: srun hands its words on, and the node's shell runs them.
    (tmp_path / "srun").write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    shell = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    words = shell.stdout.split("\0")
    lines = [words[at + 2] for at, word in enumerate(words) if word == "bash"]
    assert len(lines) == 2
    for line in lines:
        _assert_trains(line, {"SLURM_JOB_NODELIST_HET_GROUP_0": "node-7"}, "77", "node-7")


@pytest.mark.parametrize(
    ("component", "given", "words", "problem"),
    [
        (train, {"out": "o"}, ["train.max_steps=many"], "--set train.max_steps=many: train.max_steps"),
        (train, {"out": "o"}, ["model.kk=3"], "unknown key 'model.kk'; did you mean 'model.k'?"),
        (train, {"out": "o"}, ["train.max_steps"], "write it as section.key=value"),
        (train, {"out": "o"}, ["--sett", "model.k=3"], "train: No such option: --sett"),
        (plan, {"world_size": 4}, ["--set", "plan.resrve=0"], "unknown key 'plan.resrve'"),
        (plan, {"world_size": 4}, ["model.k=3"], "plan: Got unexpected extra argument"),
        (train, {"out": "o"}, ["--help"], "train: --help is no job"),
    ],
)
def test_a_wrong_word_or_key_is_refused_before_a_job_is_described(
    component: Any, given: dict[str, Any], words: list[str], problem: str
) -> None:
    """Whatever the scheduler, and without any restarts."""
    with pytest.raises(JobError, match=re.escape(problem)):
        component(*words, config=str(ROOT / "configs/dare.toml"), **given)


def test_what_may_lie_in_the_image_alone_is_not_missed_here(tmp_path: Path) -> None:
    train("--debug", config=str(ROOT / "configs/dare.toml"), out="o")
    # An image of another version may know it.
    train("model.new_key=3", config=str(ROOT / "configs/dare.toml"), out="o", check=False)
    assert train("model.kk=3", config="/in/the/image.toml", out="o").roles[0].metadata == {
        components.CONFIG: "/in/the/image.toml"
    }
    # A run that another job is about to make; one that is there and damaged is refused.
    for component, more in ((evaluate, {}), (export, {"out": "snap"})):
        assert component(run=str(tmp_path / "run"), **more).roles[0].metadata == {}
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "config.toml").write_text("[modell]\nk = 3\n")
        with pytest.raises(JobError, match="unknown key 'modell'"):
            component(run=str(tmp_path / "bad"), **more)
        with pytest.raises(JobError, match="No such option: --sinse"):
            component("--sinse", "3", run=str(tmp_path / "run"), **more)


def test_without_a_scheduler_torchx_takes_this_machine() -> None:
    """Its own default is the first name of the alphabet, aws_batch."""
    assert get_config("cli", "run", "scheduler", dirs=[str(ROOT)]) == "local_cwd"


def test_credentials_in_an_address_are_refused_before_a_scheduler_keeps_them() -> None:
    with pytest.raises(JobError, match="AWS_PROFILE") as caught:
        train(config="c.toml", out="s3://AKIDX:hush@bucket/run")
    assert "hush" not in str(caught.value)
    for given, says in (("s3:/bucket/run", "two slashes"), ("s3:///run", "names no bucket")):
        with pytest.raises(JobError, match=rf"^{given}: .*{says}"):
            train(config="c.toml", out=given)
        with pytest.raises(JobError, match=rf"^{given}: .*{says}"):
            train(f"data.log={given}", config="c.toml", out="s3://bucket/run")
    train(config="c.toml", out="s3://bucket/run")


def test_kubernetes_gets_gpus_ranks_restarts_image_and_mounts() -> None:
    pytest.importorskip("kubernetes", reason="pip install --no-deps -r requirements/kubernetes.txt")
    mounts = ["type=volume", "src=claim", "dst=/s", "type=bind", "src=/data", "dst=/data", "readonly"]
    app = train(*ODD, **JOB, mounts=mounts)
    job = _request("kubernetes", {"queue": "default", "service_account": "me"}, app).resource
    tasks = job["spec"]["tasks"]
    assert [task["name"] for task in tasks] == ["train-0", "train-1"]
    for rank, task in enumerate(tasks):
        pod = task["template"].spec
        container = pod.containers[0]
        assert container.image == "registry/tandemrec:7"
        assert container.resources.limits == {"cpu": "96000m", "memory": "900000M", "nvidia.com/gpu": "8"}
        mounted = {mount.mount_path: bool(mount.read_only) for mount in container.volume_mounts}
        assert mounted == {"/dev/shm": False, "/s": False, "/data": True}
        claims = [volume.persistent_volume_claim for volume in pod.volumes if volume.persistent_volume_claim]
        assert [claim.claim_name for claim in claims] == ["claim"]
        assert [port.container_port for port in container.ports] == [29500]
        assert container.command[:2] == ["bash", "-c"]
        environment = {entry.name: entry.value for entry in container.env} | {"VC_TRAIN_0_HOSTS": "pod-0"}
        host = "localhost" if rank == 0 else "pod-0"
        line = _kubernetes_expands(container.command[2], environment)
        _assert_trains(line, environment, job["metadata"]["name"], host)


def _kubernetes_expands(text: str, environment: dict[str, str]) -> str:
    """What Kubernetes makes of a container's command: `$(NAME)` is replaced, `$$` becomes `$`."""

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\((\w+)\)", replaced, text)


def _assert_trains(line: str, environment: dict[str, str], job: str, host: str) -> None:
    """A node's shell line first checks, then starts torchrun, both with the arguments as they were given."""
    stand_in = "python() { printf '%s\\0' \"$@\" END; }\n" + line.replace("exec python", "python")
    variables = {**environment, "PATH": os.environ["PATH"], "HOME": "/home/me"}
    shell = subprocess.run(
        ["bash", "-c", stand_in], env=variables, capture_output=True, text=True, check=True
    )
    check, run = (part.strip("\0").split("\0") for part in shell.stdout.split("\0END\0")[:2])
    trained = ["launch.cli", "train", "--config", "c.toml", "--out", "/s/run", *ODD]
    assert check == ["-m", *trained, "--check"]
    assert run[:2] == ["-m", "torch.distributed.run"] and run[-len(trained) - 2 :] == ["-m", "--", *trained]
    wanted = {"--nnodes=2", "--nproc-per-node=8", "--max-restarts=3", f"--rdzv-id={job}"}
    assert {*wanted, f"--rdzv-endpoint={host}:29500"} <= set(run)


def test_a_wrong_configuration_is_told_once_before_any_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As one that lies in an image.
    monkeypatch.setattr(components, "check_words", lambda words: None)
    log = small_log(tmp_path / "log")
    config = str(ROOT / "configs/dare.toml")
    wrong = train(
        f"data.log={log}", "model.kk=3", config=config, out=str(tmp_path / "run"), j="1x2", max_restarts=3
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    line = _command(wrong)
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "unknown key 'model.kk'; did you mean 'model.k'?" in done.stderr
    assert not (tmp_path / "run").exists()


def started(app: specs.AppDef, torchrun: bool = False) -> str:
    """Run a component's line word for word, but for the slow imports; -> what it printed.

    Args:
        torchrun: run it under torchrun where the line says so, which takes ten seconds of a core; else what
            torchrun is told to start, in one process.
    """
    role, words = app.roles[0], shlex.split(_command(app))
    assert words[:3] == ["exec", "python", "-m"] and role.num_replicas == 1
    if words[3] == "torch.distributed.run" and not torchrun:
        one = ["--standalone", "--nnodes=1", "--nproc-per-node=1", "--max-restarts=0", "-m", "--"]
        assert words[4:10] == one, "torchrun starts every verb as it starts training"
        words[3:10] = []
    done = launched(*words[3:])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_every_component_runs(tmp_path: Path) -> None:
    log, run, config = small_log(tmp_path / "log"), tmp_path / "run", str(ROOT / "configs/dare.toml")
    changed = {**SETTINGS, "data.log": str(log), "train.max_steps": 2}
    words = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    assert "samples in 2 steps" in started(train(*words, config=config, out=str(run)), torchrun=True)
    assert "trained model" in started(evaluate(run=str(run), split="validation"))
    snapshot = f"snapshot {tmp_path / 'snap' / 'v00000001'}: step 2"
    assert snapshot in started(export(run=str(run), out=str(tmp_path / "snap")))
    told = [word for pair in words for word in ("--set", pair)]
    assert "representation__item_id" in started(plan(*told, config=config, world_size=4))
    stream = write_stream(tmp_path / "stream")
    add_window(stream, "w1", rows_of(1))
    windows = online(*told, config=config, stream=str(stream), out=str(tmp_path / "online"))
    assert "samples in 2 steps" in started(windows)
    there = [name for name, each in vars(components).items() if _is_component(each)]
    assert sorted(there) == ["evaluate", "export", "online", "plan", "train", "tune"], "each is run"


def _is_component(each: object) -> bool:
    gives_app = inspect.isfunction(each) and each.__annotations__.get("return") is specs.AppDef
    return gives_app and not each.__name__.startswith("_")


def test_torchrun_takes_no_option_of_ours_for_its_own() -> None:
    """Of any verb, since any may be started under it; without `--` it takes four of them."""
    parser, ambiguous = get_args_parser(), []
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for option in (word for each in command.params for word in each.opts if word.startswith("-")):
            words = [verb, option, "value"]
            line = shlex.split(Job().torchrun(words))
            found = parser.parse_args(line[line.index("torch.distributed.run") + 1 :])
            assert (found.module, found.training_script) == (True, "launch.cli")
            assert found.training_script_args == words
            try:
                parser.parse_args(["-m", "launch.cli", *words])
            except SystemExit:
                ambiguous.append(f"{verb} {option}")
    assert ambiguous == [
        *(
            "evaluate --run",
            "export --run",
            "export --log",
            "unshard --run",
            "cluster --log",
            "windows --log",
        ),
        "vectors --log",
    ]


def test_one_environment_holds_one_set_and_a_gpu_takes_one_rank(tmp_path: Path) -> None:
    """make, in a folder where the set for the CPU is installed."""
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements/common.txt",
        "requirements/cpu.txt",
        "requirements/cuda.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 2\n")  # GPUs, but at most two
    python.chmod(0o755)
    (tmp_path / ".venv" / ".installed-cpu").touch()

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-C", str(tmp_path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = make("install", "DEVICE=cuda")
    assert refused.returncode == 2
    assert ".venv holds the set for DEVICE=cpu: make clean install DEVICE=cuda" in refused.stderr
    assert "train DARE on 2 ranks" in make("-n", "train", "DEVICE=cuda").stdout
    python.unlink()
    assert "train DARE on 1 ranks" in make("-n", "train", "DEVICE=cuda").stdout
    assert "train DARE on 2 ranks" in make("-n", "train").stdout
    assert "train DARE on 5 ranks" in make("-n", "train", "DEVICE=cuda", "NPROC=5").stdout


def test_the_image_is_made_of_what_is_there() -> None:
    """The image cannot be built here: what its file names must at least exist, and be let into the build."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [word for line in text.splitlines() if line.startswith("COPY ") for word in line.split()[1:-1]]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"launch", "pipelines", "trainer", "embeddings", "configs", "requirements"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists() and source in let_in, source
    assert "requirements/$DEVICE.txt" in text
    for device in ("cpu", "cuda"):
        assert (ROOT / "requirements" / f"{device}.txt").is_file()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    torch = re.search(r"torch==[\d.]+", text)
    assert torch is not None and f"TORCH = {torch[0]}\n" in makefile
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if line.startswith("USER ")] == ["USER tandemrec"]
    assert lines.index("USER tandemrec") > max(n for n, line in enumerate(lines) if line.startswith("RUN"))
    assert lines[-1] == 'CMD ["python", "-m", "launch.cli", "--help"]'


def test_workers_of_a_study_are_replicas(tmp_path: Path) -> None:
    given = {"config": "configs/dare.toml", "space": "configs/spaces/rates.toml", "out": "/shared/study"}
    app = tune("--trials", "4", "data.log=log", **given, workers=3)
    assert [(role.name, role.num_replicas, role.min_replicas) for role in app.roles] == [("tune", 3, 3)]
    words = "tune --config configs/dare.toml --space configs/spaces/rates.toml --out /shared/study --trials 4"
    assert _command(app) == f"exec python -m launch.cli {words} data.log=log"
    assert "--standalone --nnodes=1 --nproc-per-node=2" in _command(tune(**given, j="1x2"))
    with pytest.raises(JobError, match="give the number of nodes as --workers"):
        tune(**given, j="2x1")
    with pytest.raises(JobError, match="needs at least one"):
        tune(**given, workers=0)
    wrong = tmp_path / "space.toml"
    wrong.write_text("[parameters]\na = { low = 2, high = 1 }\n")
    with pytest.raises(JobError, match="low = 2 must be less than high = 1"):
        tune(**{**given, "space": str(wrong)})
