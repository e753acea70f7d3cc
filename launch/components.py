"""TorchX components: the jobs that `torchx run launch/components.py:VERB` submits, one function a verb.

    torchx run -s local_cwd launch/components.py:train --config configs/dare.toml --out runs/a -j 1x2
    torchx run -s slurm launch/components.py:train --config ... --out ... -j 2x8 --gpu 8 --max_restarts 3
    torchx run -s local_cwd launch/components.py:train --help

TorchX builds each command line from the signature and from the `Args:` section of the docstring.
It reads the annotations as objects and knows only typing's Dict, List and Optional, which is why
this file neither postpones annotations nor uses their modern spelling. See docs/cluster.md.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Dict, List, Optional  # noqa: UP035

from torchx import specs
from torchx.specs.finder import ComponentValidationException

_SHAPE = re.compile(r"(?:(?:(?P<least>\d+):)?(?P<nodes>\d+)x)?(?P<ranks>\d+)")
_CLI = ("python", "-m", "launch.cli")


class JobError(ComponentValidationException, ValueError):  # type: ignore[misc]
    """A job option is wrong; TorchX shows its validation errors as a message, any other as a traceback."""


@dataclass(frozen=True)
class JobShape:
    """`-j`: how many nodes (at least, at most) and how many ranks on each."""

    least_nodes: int = 1
    nodes: int = 1
    ranks: int = 1

    @property
    def nnodes(self) -> str:
        """The spelling of torchrun's --nnodes."""
        return str(self.nodes) if self.least_nodes == self.nodes else f"{self.least_nodes}:{self.nodes}"


@dataclass(frozen=True)
class _Node:
    """What every node of a job is given; see the components' `Args:` for the fields."""

    image: str
    cpu: int
    gpu: int
    memMB: int
    h: str | None
    env: Mapping[str, str] | None
    mounts: Sequence[str] | None
    resource: specs.Resource = field(init=False)

    def __post_init__(self) -> None:
        try:
            found = specs.resource(cpu=self.cpu or _cores(), gpu=self.gpu, memMB=self.memMB, h=self.h)
        except KeyError as error:
            raise JobError(f"-h {self.h}: {_text(error)}") from None
        object.__setattr__(self, "resource", found)

    def role(self, name: str, line: str, shape: JobShape, threads: int) -> specs.Role:
        """A role that runs one shell line on each node."""
        if 0 < self.resource.gpu < shape.ranks:
            raise JobError(
                f"-j {shape.nnodes}x{shape.ranks}: a node has {self.resource.gpu} GPU(s), and NCCL refuses "
                f"two ranks on one; ask for --gpu {shape.ranks}, or for -j {shape.nnodes}x{self.resource.gpu}"
            )
        per_rank = threads or max(1, int(self.resource.cpu) // shape.ranks)
        try:
            mounts = specs.parse_mounts(list(self.mounts)) if self.mounts else []
        except (KeyError, ValueError) as error:
            example = "type=bind,src=/host,dst=/job or type=volume,src=claim,dst=/job"
            raise JobError(
                f"--mounts {','.join(self.mounts or ())}: {_text(error)}; write {example}"
            ) from None
        return specs.Role(
            name=name,
            image=self.image,
            entrypoint="bash",
            args=["-c", line],
            num_replicas=shape.nodes,
            min_replicas=shape.least_nodes,
            resource=self.resource,
            env={"OMP_NUM_THREADS": str(per_rank), **(self.env or {})},
            mounts=mounts,
        )


def parse_shape(text: str) -> JobShape:
    """Reads `[[least:]nodes x] ranks`, for example `2`, `1x2` or `2:4x8`.

    Raises:
        JobError: not of this form, a zero, or more least nodes than nodes.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise JobError(f"-j {text!r}: write it as NODESxRANKS, for example 1x2, or LEAST:NODESxRANKS")
    nodes = int(match["nodes"] or 1)
    shape = JobShape(int(match["least"] or nodes), nodes, int(match["ranks"]))
    if shape.ranks < 1 or not 1 <= shape.least_nodes <= shape.nodes:
        raise JobError(f"-j {text!r}: needs at least one rank, and 1 <= LEAST <= NODES")
    return shape


def _text(error: Exception) -> str:
    return str(error.args[0]) if error.args else type(error).__name__


def _cores() -> int:
    # The cores this process may use, not those the machine has: they differ under cgroups and taskset.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quote(words: Sequence[str]) -> str:
    """Words of a shell line that no templating on the way to the shell can change.

    TorchX runs string.Template over every argument, so `$` is doubled. Kubernetes then replaces `$(NAME)` and
    `$$` in a container's command, so no `$` may stand before another one or a parenthesis: the empty quotes
    after each keep them apart, and the shell drops them (shlex puts every `$` inside single quotes).
    """
    return " ".join(shlex.quote(word).replace("$", "$$''") for word in words)


def _rendezvous(shape: JobShape, port: int) -> list[str]:
    """The shell words that tell ranks where to meet; the endpoint is left for the node's shell to expand."""
    if shape.nodes == 1:
        return ["--standalone"]
    # Which variable holds rank 0's host depends on the scheduler, so TorchX fills in its name; some
    # schedulers leave it unset on rank 0 itself, hence the default. `$$` survives TorchX's own templating.
    host = f"$${{{specs.macros.rank0_env}:=localhost}}"
    return [
        "--rdzv-backend=c10d",
        f'--rdzv-endpoint="{host}:{port}"',
        f"--rdzv-id={specs.macros.app_id}",
    ]


def _torchrun(shape: JobShape, max_restarts: int, port: int, words: Sequence[str]) -> str:
    """One shell line. `exec`, so that a stop signal reaches torchrun and not a shell that waits for it.

    torchrun looks for options of its own behind the name of the script, too, and takes beginnings of them:
    `--run` might be its `--run-path`. Nothing behind `--` is one.
    """
    options = [
        *_rendezvous(shape, port),
        f"--nnodes={shape.nnodes}",
        f"--nproc-per-node={shape.ranks}",
        f"--max-restarts={max_restarts}",
    ]
    line = " ".join(["exec python -m torch.distributed.run", *options, "-m -- launch.cli", _quote(words)])
    if max_restarts and words[0] == "train":
        # torchrun restarts whatever failed: what no restart can mend is found before it takes over.
        line = f"{_quote([*_CLI, *words, '--check'])} && {line}"
    return line


def _app(name: str, role: specs.Role, port: int = 0, max_retries: int = 0) -> specs.AppDef:
    role.max_retries = max_retries
    role.port_map = {"c10d": port} if role.num_replicas > 1 else {}
    return specs.AppDef(name=name, roles=[role])


def train(
    *args: str,
    config: str,
    out: str,
    j: str = "1x1",
    name: str = "tandemrec",
    image: str = "tandemrec:latest",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 16384,
    h: Optional[str] = None,  # noqa: UP045
    threads: int = 0,
    max_restarts: int = 0,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Trains one model with `tandemrec train`, on one rank or many. A run that exists is resumed.

    Args:
        args: overrides of the configuration, after a `--`, for example `-- data.log=log train.max_steps=100`
        config: the TOML configuration
        out: the run folder; with several nodes it must be on storage that all of them share
        j: [[least nodes:]nodes x]ranks per node
        name: the job's name
        image: the container image, for schedulers that use one
        cpu: cores per node; 0 takes the cores of the machine that submits
        gpu: GPUs per node
        memMB: memory per node in MB, for schedulers that enforce it
        h: a registered named resource, instead of cpu, gpu and memMB
        threads: CPU threads per rank (OMP_NUM_THREADS); 0 divides a node's cores by its ranks
        max_restarts: how often torchrun restarts all ranks after one failed; use 3 or more for unattended
            jobs, where a restart may itself fail to reconnect. Above 0, the configuration is checked first
        max_retries: how often the scheduler starts the whole job again (Slurm requeues it)
        rdzv_port: the port on the first node where several nodes meet
        env: further environment variables, FOO=1,BAR=2
        mounts: mounts, type=bind,src=/host,dst=/job[,readonly] or type=volume,src=claim,dst=/job
    """
    shape = parse_shape(j)
    words = ["train", "--config", config, "--out", out, *args]
    line = _torchrun(shape, max_restarts, rdzv_port, words)
    role = _Node(image, cpu, gpu, memMB, h, env, mounts).role("train", line, shape, threads)
    return _app(name, role, rdzv_port, max_retries)


def evaluate(
    run: str,
    split: str = "test",
    j: str = "1x1",
    name: str = "tandemrec-evaluate",
    image: str = "tandemrec:latest",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 16384,
    h: Optional[str] = None,  # noqa: UP045
    threads: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Measures a trained run with `tandemrec evaluate`, on any number of ranks, not only as many as trained it.

    Args:
        run: the run folder; with several nodes it must be on storage that all of them share
        split: train, validation or test
        j: [[least nodes:]nodes x]ranks per node
        name: the job's name
        image: the container image, for schedulers that use one
        cpu: cores per node; 0 takes the cores of the machine that submits
        gpu: GPUs per node
        memMB: memory per node in MB, for schedulers that enforce it; rank 0's node also holds all the scores
        h: a registered named resource, instead of cpu, gpu and memMB
        threads: CPU threads per rank (OMP_NUM_THREADS); 0 divides a node's cores by its ranks
        max_restarts: how often torchrun restarts all ranks after one failed
        rdzv_port: the port on the first node where several nodes meet
        env: further environment variables, FOO=1,BAR=2
        mounts: mounts, type=bind,src=/host,dst=/job[,readonly] or type=volume,src=claim,dst=/job
    """
    shape = parse_shape(j)
    line = _torchrun(shape, max_restarts, rdzv_port, ["evaluate", "--run", run, "--split", split])
    role = _Node(image, cpu, gpu, memMB, h, env, mounts).role("evaluate", line, shape, threads)
    return _app(name, role, rdzv_port)


def export(
    run: str,
    out: str,
    name: str = "tandemrec-export",
    image: str = "tandemrec:latest",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 16384,
    h: Optional[str] = None,  # noqa: UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Writes a serving snapshot of a run with `tandemrec export`, in one process.

    Args:
        run: the run folder
        out: the folder of snapshots
        name: the job's name
        image: the container image, for schedulers that use one
        cpu: cores of the node; 0 takes the cores of the machine that submits
        gpu: GPUs of the node
        memMB: memory of the node in MB, for schedulers that enforce it: all tables in one piece, twice
        h: a registered named resource, instead of cpu, gpu and memMB
        env: further environment variables, FOO=1,BAR=2
        mounts: mounts, type=bind,src=/host,dst=/job[,readonly] or type=volume,src=claim,dst=/job
    """
    line = f"exec {_quote([*_CLI, 'export', '--run', run, '--out', out])}"
    role = _Node(image, cpu, gpu, memMB, h, env, mounts).role("export", line, JobShape(), 0)
    return _app(name, role)


def plan(
    *args: str,
    config: str,
    world_size: int,
    hbm: Optional[str] = None,  # noqa: UP045
    name: str = "tandemrec-plan",
    image: str = "tandemrec:latest",
    cpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
) -> specs.AppDef:
    """
    Prints the sharding plan with `tandemrec plan`; needs no GPU, whatever it plans for.

    Args:
        args: further arguments of `tandemrec plan`, after a `--`, for example `-- --set data.log=log`
        config: the TOML configuration
        world_size: the number of ranks to plan for
        hbm: device memory per rank, such as 141GB
        name: the job's name
        image: the container image, for schedulers that use one
        cpu: cores of the node; 0 takes the cores of the machine that submits
        memMB: memory of the node in MB, for schedulers that enforce it
        env: further environment variables, FOO=1,BAR=2
        mounts: mounts, type=bind,src=/host,dst=/job[,readonly] or type=volume,src=claim,dst=/job
    """
    words = [
        "plan",
        "--config",
        config,
        "--world-size",
        str(world_size),
        *(["--hbm", hbm] if hbm else []),
        *args,
    ]
    line = f"exec {_quote([*_CLI, *words])}"
    role = _Node(image, cpu, 0, memMB, None, env, mounts).role("plan", line, JobShape(), 0)
    return _app(name, role)
