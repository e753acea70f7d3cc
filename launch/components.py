"""TorchX components: the jobs that `torchx run launch/components.py:VERB` submits, one function a verb.

    torchx run -s local_cwd launch/components.py:train --config configs/dare.toml --out runs/a -j 1x2
    torchx run -s slurm launch/components.py:train --config ... --out ... -j 2x8 --gpu 8 --max_restarts 3
    torchx run -s local_cwd launch/components.py:train --help

TorchX builds each command line from the signature and from the `Args:` section of the docstring.
It reads the annotations as objects and knows only typing's Dict, List and Optional, which is why
this file neither postpones annotations nor uses their modern spelling. See docs/cluster.md.
"""

import inspect
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, Dict, List, Optional  # noqa: UP035

from torchx import specs
from torchx.specs.finder import ComponentValidationException

_SHAPE = re.compile(r"(?:(?:(?P<least>\d+):)?(?P<nodes>\d+)x)?(?P<ranks>\d+)")
# What a role's metadata call the configuration file.
CONFIG = "tandemrec/config"
_CLI = ("python", "-m", "launch.cli")
OptionalText = Optional[str]  # noqa: UP045
OptionalTexts = Optional[List[str]]  # noqa: UP006, UP045
OptionalPairs = Optional[Dict[str, str]]  # noqa: UP006, UP045


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


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class Job:
    """Where and how a component runs: each field is an option of the components that name it."""

    j: str = _option("1x1", "[[least nodes:]nodes x]ranks per node")
    name: str = _option("tandemrec", "the job's name")
    image: str = _option("tandemrec:latest", "the container image, for schedulers that use one")
    cpu: int = _option(0, "cores per node; 0 takes the cores of the machine that submits")
    gpu: int = _option(0, "GPUs per node")
    memMB: int = _option(16384, "memory per node in MB, for schedulers that enforce it")
    h: OptionalText = _option(None, "a registered named resource, instead of cpu, gpu and memMB")  # noqa: RUF009
    threads: int = _option(0, "CPU threads per rank (OMP_NUM_THREADS); 0 divides a node's cores by its ranks")
    max_restarts: int = _option(
        0,
        "how often torchrun restarts all ranks after one failed; use 3 or more for unattended jobs, where a "
        "restart may itself fail to reconnect",
    )
    max_retries: int = _option(0, "how often the scheduler starts the whole job again (Slurm requeues it)")
    rdzv_port: int = _option(29500, "the port on the first node where several nodes meet")
    env: OptionalPairs = _option(None, "further environment variables, FOO=1,BAR=2")  # noqa: RUF009
    mounts: OptionalTexts = _option(  # noqa: RUF009
        None, "mounts, type=bind,src=/host,dst=/job[,readonly] or type=volume,src=claim,dst=/job"
    )
    check: bool = _option(
        True,
        "read the command line and the configuration before anything is submitted; False where only the "
        "nodes can, with an image of another version, say, or packages or files that are not here",
    )

    def torchrun(self, words: Sequence[str]) -> str:
        """One shell line. `exec`, so that a stop signal reaches torchrun and not a shell that waits for it.

        torchrun looks for options of its own behind the name of the script, too, and takes beginnings of
        them: `--run` might be its `--run-path`. Nothing behind `--` is one.
        """
        shape = parse_shape(self.j)
        # Where the ranks meet. Which variable holds rank 0's host depends on the scheduler, so TorchX fills
        # in its name; some schedulers leave it unset on rank 0 itself, hence the default. The node's shell
        # expands the endpoint: `$$` survives TorchX's own templating.
        host = f"$${{{specs.macros.rank0_env}:=localhost}}"
        several = [
            "--rdzv-backend=c10d",
            f'--rdzv-endpoint="{host}:{self.rdzv_port}"',
            f"--rdzv-id={specs.macros.app_id}",
        ]
        options = [
            *(several if shape.nodes > 1 else ["--standalone"]),
            f"--nnodes={shape.nnodes}",
            f"--nproc-per-node={shape.ranks}",
            f"--max-restarts={self.max_restarts}",
        ]
        line = " ".join(["exec python -m torch.distributed.run", *options, "-m -- launch.cli", _quote(words)])
        if self.max_restarts and words[0] == "train":
            # torchrun restarts whatever failed: what no restart can mend is found before it takes over.
            line = f"{_quote([*_CLI, *words, '--check'])} && {line}"
        return line

    def app(self, words: Sequence[str], ranks: bool = False) -> specs.AppDef:
        """A job that runs one command line of tandemrec on each node.

        Args:
            ranks: under torchrun, and not in one process.

        Raises:
            JobError: an option is wrong, there are more ranks than GPUs on a node that has some, or the
                command line or its configuration could not be read there either.
        """
        from embeddings.errors import ConfigError
        from trainer.storage.addresses import address_of

        shape, given = parse_shape(self.j), self.mounts or []
        line = self.torchrun(words) if ranks else f"exec {_quote([*_CLI, *words])}"
        try:
            # Schedulers keep and show what a job runs, and a wrong address would be found out there only.
            for word in shlex.split(line):
                address_of(word)
                address_of(word.partition("=")[2])
        except ConfigError as error:
            raise JobError(str(error)) from None
        config = check_words(words) if self.check else None
        try:
            resource = specs.resource(cpu=self.cpu or _cores(), gpu=self.gpu, memMB=self.memMB, h=self.h)
        except KeyError as error:
            raise JobError(f"-h {self.h}: {_text(error)}") from None
        try:
            mounts = list(specs.parse_mounts(list(given))) if given else []
        except (KeyError, ValueError) as error:
            example = "type=bind,src=/host,dst=/job or type=volume,src=claim,dst=/job"
            raise JobError(f"--mounts {','.join(given)}: {_text(error)}; write {example}") from None
        if 0 < resource.gpu < shape.ranks:
            raise JobError(
                f"-j {shape.nnodes}x{shape.ranks}: a node has {resource.gpu} GPU(s), and NCCL refuses "
                f"two ranks on one; ask for --gpu {shape.ranks}, or for -j {shape.nnodes}x{resource.gpu}"
            )
        per_rank = self.threads or max(1, int(resource.cpu) // shape.ranks)
        node = specs.Role(
            name=words[0],
            image=self.image,
            entrypoint="bash",
            args=["-c", line],
            num_replicas=shape.nodes,
            min_replicas=shape.least_nodes,
            max_retries=self.max_retries,
            port_map={"c10d": self.rdzv_port} if shape.nodes > 1 else {},
            resource=resource,
            env={"OMP_NUM_THREADS": str(per_rank), **(self.env or {})},
            mounts=mounts,
            metadata={} if config is None else {CONFIG: str(config)},
        )
        return specs.AppDef(name=self.name, roles=[node])


def check_words(words: Sequence[str]) -> Path | None:
    """Read a command line of tandemrec, and its configuration where that lies on this machine.

    Whatever is wrong there would be found by the job, hours later perhaps.

    Returns:
        The configuration file that it names, there or not; None where it names none, or one in a store.

    Raises:
        JobError: an option, an override or the configuration is wrong.
    """
    import typer

    from embeddings.errors import ConfigError
    from launch.cli import app

    verb, *options = words
    command: Any = typer.main.get_command(app)
    try:
        given = command.commands[verb].make_context(verb, [o for o in options if o != "--debug"]).params
    except typer.Exit:
        raise JobError(f"{verb}: --help is no job; see `tandemrec {verb} --help`") from None
    except typer.TyperException as error:
        raise JobError(f"{verb}: {error.format_message()} (see `tandemrec {verb} --help`)") from None
    except ConfigError as error:
        raise JobError(f"{verb}: {error}") from None
    config, run = given.get("config"), given.get("run_folder")
    # In an image, or in a store that only the nodes reach, it may be all the same.
    file = config if isinstance(config, Path) else run / "config.toml" if isinstance(run, Path) else None
    if file is not None and file.is_file():
        from trainer.run_config import load_config

        try:
            load_config(file, [*(given.get("overrides") or []), *(given.get("more") or [])])
        except ConfigError as error:
            raise JobError(str(error)) from None
    return config if isinstance(config, Path) else None


def check_space(space: Path) -> None:
    """Raises JobError where the space lies on this machine and is wrong."""
    from embeddings.errors import ConfigError
    from pipelines.tune.settings import read_space

    try:
        if space.is_file():
            read_space(space)
    except ConfigError as error:
        raise JobError(str(error)) from None


_NODE = ("name", "image", "cpu", "gpu", "memMB", "h", "env", "mounts", "check")
_RANKS = (*_NODE, "j", "threads", "max_restarts", "rdzv_port")


def _component(*options: str, **defaults: Any) -> Callable[[Callable[..., specs.AppDef]], Any]:
    """Gives a component these options of `Job`; it is called with a `job` made of them.

    TorchX reads a component's signature and docstring, so the options are added to both.

    Args:
        defaults: of options whose default is not the one in `Job`.
    """
    chosen = [option for option in fields(Job) if option.name in options]

    def parameter(option: Field[Any]) -> inspect.Parameter:
        default = defaults.get(option.name, option.default)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(option.name, kind, default=default, annotation=option.type)

    def extend(function: Callable[..., specs.AppDef]) -> Any:
        @wraps(function)
        def component(*args: Any, **given: Any) -> specs.AppDef:
            job = {option.name: given.pop(option.name) for option in chosen if option.name in given}
            return function(*args, **given, job=Job(**{**defaults, **job}))

        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.name != "job"]
        lines = [f"        {option.name}: {option.metadata['help']}" for option in chosen]
        component.__doc__ = "\n".join([str(function.__doc__).rstrip(), *lines, "    "])
        component.__dict__["__signature__"] = signature.replace(parameters=[*own, *map(parameter, chosen)])
        return component

    return extend


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


@_component(*_RANKS, "max_retries")
def train(*args: str, config: str, out: str, job: Job) -> specs.AppDef:
    """
    Trains one model with `tandemrec train`, on one rank or many. A run that exists is resumed.

    The configuration is read before the job is submitted, where it lies on this machine. With max_restarts
    above 0 it is held against the log, too, before ranks are started.

    Args:
        args: overrides of the configuration, after a `--`, for example `-- data.log=log train.max_steps=100`
        config: the TOML configuration
        out: the run folder; with several nodes it must be on storage that all of them share
    """
    return job.app(["train", "--config", config, "--out", out, *args], ranks=True)


@_component(*_RANKS, "max_retries", name="tandemrec-online")
def online(*args: str, config: str, stream: str, out: str, snapshots: str = "", job: Job) -> specs.AppDef:
    """
    Trains a stream with `tandemrec online`, on one rank or many. A run that exists goes on.

    The first rank has one more process, which publishes versions.

    Args:
        args: further options and overrides, after a `--`, for example `-- --follow train.seed=2`
        config: the TOML configuration
        stream: the folder of the stream; with several nodes it must be on storage that all of them share
        out: the run folder; with several nodes it must be on storage that all of them share
        snapshots: where versions are published; else nothing is
    """
    words = ["online", "--config", config, "--stream", stream, "--out", out]
    return job.app([*words, *(["--snapshots", snapshots] if snapshots else []), *args], ranks=True)


@_component(*_RANKS, "max_retries", name="tandemrec-tune")
def tune(*args: str, config: str, space: str, out: str, workers: int = 1, job: Job) -> specs.AppDef:
    """
    Searches for better settings with `tandemrec tune`, in several workers that share one study.

    Each worker is a node of its own. With `-j 1x2` it trains its trials on two ranks.

    Args:
        args: further options and overrides, after a `--`, for example `-- --trials 40 data.log=log`
        config: the TOML configuration
        space: the TOML file with the parameters and the budget
        out: the study's folder; it must be on storage that all workers share
        workers: nodes that take trials of the study
    """
    shape = parse_shape(job.j)
    if shape.nodes > 1:
        raise JobError(f"-j {job.j}: a worker is one node; give the number of nodes as --workers")
    if workers < 1:
        raise JobError(f"--workers {workers}: needs at least one")
    if job.check:
        check_space(Path(space))
    app = job.app(["tune", "--config", config, "--space", space, "--out", out, *args], shape.ranks > 1)
    app.roles[0].num_replicas = app.roles[0].min_replicas = workers
    return app


@_component(*_RANKS, name="tandemrec-evaluate")
def evaluate(
    *args: str, run: str, split: str = "test", device: OptionalText = None, sample: int = 0, job: Job
) -> specs.AppDef:
    """
    Measures a trained run with `tandemrec evaluate`, on any number of ranks, not only as many as trained it.

    The first node measures; what its memory does not hold goes through files in the run folder.

    Args:
        args: further options of `tandemrec evaluate`, after a `--`, for example `-- --checkpoint newest`
        run: the run folder; with several nodes it must be on storage that all of them share
        split: train, validation or test
        device: auto, cpu or cuda; the default is the run's train.device
        sample: about so many candidates at most, those of some users; 0 is all
    """
    words = ["evaluate", "--run", run, "--split", split, *(["--device", device] if device else [])]
    words += [*(["--sample", str(sample)] if sample else []), *args]
    return job.app(words, ranks=True)


@_component(*_NODE, name="tandemrec-export")
def export(*args: str, run: str, out: str, device: OptionalText = None, job: Job) -> specs.AppDef:
    """
    Writes a serving snapshot of a run with `tandemrec export`, in one process.

    Tables stream through it, so that the node's memory need not hold them; some gigabytes are enough.

    Args:
        args: further options of `tandemrec export`, after a `--`, for example `-- --dtype int8 --since 3`
        run: the run folder
        out: the folder of snapshots
        device: auto, cpu or cuda; the default is the run's train.device
    """
    words = ["export", "--run", run, "--out", out, *(["--device", device] if device else []), *args]
    return job.app(words)


@_component("name", "image", "cpu", "memMB", "env", "mounts", "check", name="tandemrec-plan", memMB=4096)
def plan(*args: str, config: str, world_size: int, hbm: OptionalText = None, job: Job) -> specs.AppDef:
    """
    Prints the sharding plan with `tandemrec plan`; needs no GPU, whatever it plans for.

    Args:
        args: further arguments of `tandemrec plan`, after a `--`, for example `-- --set data.log=log`
        config: the TOML configuration
        world_size: the number of ranks to plan for
        hbm: device memory per rank, such as 141GB
    """
    words = ["plan", "--config", config, "--world-size", str(world_size)]
    words += [*(["--hbm", hbm] if hbm else []), *args]
    return job.app(words)
