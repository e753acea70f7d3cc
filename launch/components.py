"""TorchX components: the job description that `torchx run launch/components.py:train` submits.

    torchx run -s local_cwd launch/components.py:train --config configs/dare.toml --out runs/a -j 1x2
    torchx run -s slurm launch/components.py:train --config ... --out ... -j 4x8 --cpu 96 --gpu 8

TorchX builds its command line from the signature and from the `Args:` section of the docstring.
It reads the annotations as objects and knows only typing's Dict, List and Optional, which is why
this file neither postpones annotations nor uses their modern spelling.
"""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Dict, List, Optional  # noqa: UP035

from torchx import specs

_SHAPE = re.compile(r"(?:(?:(?P<least>\d+):)?(?P<nodes>\d+)x)?(?P<ranks>\d+)")


@dataclass(frozen=True)
class JobShape:
    """`-j`: how many nodes (at least, at most) and how many ranks on each."""

    least_nodes: int
    nodes: int
    ranks: int

    @property
    def nnodes(self) -> str:
        """The spelling of torchrun's --nnodes."""
        return str(self.nodes) if self.least_nodes == self.nodes else f"{self.least_nodes}:{self.nodes}"


def parse_shape(text: str) -> JobShape:
    """Reads `[[least:]nodes x] ranks`, for example `2`, `1x2` or `2:4x8`.

    Raises:
        ValueError: not of this form, a zero, or more least nodes than nodes.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"-j {text!r}: write it as NODESxRANKS, for example 1x2, or LEAST:NODESxRANKS")
    nodes = int(match["nodes"] or 1)
    shape = JobShape(int(match["least"] or nodes), nodes, int(match["ranks"]))
    if shape.ranks < 1 or not 1 <= shape.least_nodes <= shape.nodes:
        raise ValueError(f"-j {text!r}: needs at least one rank, and 1 <= LEAST <= NODES")
    return shape


def _cores() -> int:
    # The cores this process may use, not those the machine has: they differ under cgroups and taskset.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _quote(words: Sequence[str]) -> list[str]:
    # Quoted for the shell, and `$` doubled, because TorchX runs string.Template over every argument first.
    return [shlex.quote(word).replace("$", "$$") for word in words]


def _command(shape: JobShape, max_restarts: int, port: int, trainer_args: Sequence[str]) -> str:
    """One shell line. `exec`, so that a stop signal reaches torchrun and not a shell that waits for it."""
    torchrun = [
        f"--nnodes={shape.nnodes}",
        f"--nproc-per-node={shape.ranks}",
        f"--max-restarts={max_restarts}",
    ]
    words = ["exec", "python", "-m", "torch.distributed.run", *_rendezvous(shape, port), *torchrun]
    return " ".join([*words, "-m", "launch.cli", "train", *_quote(trainer_args)])


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
        max_restarts: how often torchrun restarts all ranks after one failed. 0 by default, because an
            error in the configuration would fail again every time; use 3 or more for unattended jobs,
            where a restart may itself fail to reconnect
        rdzv_port: the port on the first node where several nodes meet
        env: further environment variables, FOO=1,BAR=2
        mounts: mounts, type=bind,src=/host,dst=/job[,readonly]
    """
    shape = parse_shape(j)
    resource = specs.resource(cpu=cpu or _cores(), gpu=gpu, memMB=memMB, h=h)
    per_rank = threads or max(1, int(resource.cpu) // shape.ranks)
    trainer_args = ["--config", config, "--out", out, *args]
    role = specs.Role(
        name="train",
        image=image,
        entrypoint="bash",
        args=["-c", _command(shape, max_restarts, rdzv_port, trainer_args)],
        num_replicas=shape.nodes,
        min_replicas=shape.least_nodes,
        resource=resource,
        env={"OMP_NUM_THREADS": str(per_rank), **(env or {})},
        port_map={"c10d": rdzv_port},
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=name, roles=[role])
