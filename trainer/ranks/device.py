"""Where a rank computes: `train.device`, the builds that are installed, and the GPUs that the process sees.

The choice is a pure function of `Machine`, which `doctor` looks at too, so that both say the same.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from embeddings.errors import ConfigError
from trainer.ranks.machine import installed, this_machine

DeviceName = Literal["auto", "cpu", "cuda"]
CPU_FBGEMM, CUDA_FBGEMM = "fbgemm-gpu-cpu", "fbgemm-gpu"
INSTALL_CUDA = "for the GPU install the CUDA builds: `make clean install DEVICE=cuda`"
_ON_CPU = "computing on the CPU: "
USE_CPU = 'train.device = "cpu" takes the CPU without this line'
# How long rank 0 stays, and how often it looks, until ranks that will not work together have heard why.
_HEAR_S, _LOOK_S = 5.0, 0.02
# Read from the fat binaries of the wheels on PyPI: machine code for these and no PTX that a driver could
# translate for another one. Code runs on devices of the same major number and the same or a higher minor one.
FBGEMM_ARCHES = {"1.6": ("sm_80", "sm_90", "sm_100"), "1.8": ("sm_80", "sm_90", "sm_100")}


@dataclass(frozen=True)
class Gpu:
    """A device as torch names it; capability: its major and minor number."""

    name: str
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Machine:
    """What the choice is made from.

    Attributes:
        torch_cuda: the CUDA release that torch was built for; None = a CPU build.
        fbgemm: the build that is installed: `cpu`, `cuda`, `both` or `unknown`; fbgemm_version: of it.
        gpus: those that this process sees; torch_arches: for which torch has code, as
            `torch.cuda.get_arch_list` names them.
        problem: what CUDA says where it sees none, such as that the driver is too old.
        boards: NVIDIA devices that the system has, seen by CUDA or not.
    """

    torch_cuda: str | None = None
    fbgemm: str = "cpu"
    fbgemm_version: str = ""
    gpus: tuple[Gpu, ...] = ()
    torch_arches: tuple[str, ...] = ()
    problem: str = ""
    boards: int = 0


@dataclass(frozen=True)
class Choice:
    """The device, and a line about why it is not the one that a user may expect; empty = nothing to say."""

    device: torch.device
    note: str = ""


def fbgemm_build(versions: Mapping[str, str | None], variant: str) -> str:
    """Which build of fbgemm is installed: `cpu`, `cuda`, `both` or `unknown`.

    Args:
        versions: distribution -> version, None where it is not installed.
        variant: `fbgemm_gpu.__variant__`, which alone knows of builds under other names (nightly ones).
    """
    cpu, cuda = versions.get(CPU_FBGEMM), versions.get(CUDA_FBGEMM)
    if cpu is not None and cuda is not None:
        return "both"
    if cpu is None and cuda is None:
        return variant if variant in ("cpu", "cuda") else "unknown"
    return "cpu" if cuda is None else "cuda"


def has_code(capability: tuple[int, int], arches: Sequence[str]) -> bool:
    """Whether binaries for `arches` (`sm_90`, `sm_90a`, `compute_90`, ...) run on a device."""
    for arch in arches:
        kind, _, number = arch.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        version = int(digits[:-1] or 0), int(digits[-1])
        if number != digits:
            # Of one architecture alone.
            fits = version == capability
        elif kind == "compute":
            # PTX, which the driver translates for this or any later device.
            fits = version <= capability
        else:
            fits = version[0] == capability[0] and version[1] <= capability[1]
        if fits:
            return True
    return False


def missing_code(machine: Machine, gpu: Gpu) -> str:
    """Which wheel has no code for a GPU, and for which it has some; empty where all is well."""
    release = ".".join(machine.fbgemm_version.split(".")[:2])
    wheels = {
        f"fbgemm {machine.fbgemm_version}": FBGEMM_ARCHES.get(release, ()),
        "torch": machine.torch_arches,
    }
    for wheel, arches in wheels.items():
        # A release that is not in the table, or a torch that says nothing, may do.
        if arches and not has_code(gpu.capability, arches):
            return f"{gpu.name} is {gpu.arch}, and {wheel} has code for {', '.join(arches)} only"
    return ""


def _remedy(problem: str) -> str:
    """What to do where CUDA sees no GPU, by what it says itself."""
    if "driver" in problem and "too old" in problem:
        return "update NVIDIA's driver (`nvidia-smi` tells which it is)"
    if "no NVIDIA driver" in problem:
        return "install NVIDIA's driver; in a container, start it with its GPUs (docker run --gpus all)"
    return "look at `nvidia-smi`, CUDA_VISIBLE_DEVICES, and how a container or job is given its GPUs"


def obstacle(machine: Machine, index: int = 0) -> tuple[str, str] | None:
    """Why CUDA cannot be used, and what to do about it; None where it can.

    Args:
        index: of the GPU.
    """
    if machine.torch_cuda is None:
        return "torch is a CPU build", INSTALL_CUDA
    if machine.fbgemm == "both":
        both = f"{CPU_FBGEMM} and {CUDA_FBGEMM} are both installed and overwrite each other"
        return both, "`make clean install DEVICE=cuda` (or DEVICE=cpu)"
    if machine.fbgemm != "cuda":
        unknown = "fbgemm is not installed, or does not say for which device it was built"
        of_cpu = f"{CPU_FBGEMM} is the CPU build of fbgemm"
        return unknown if machine.fbgemm == "unknown" else of_cpu, INSTALL_CUDA
    if not machine.gpus:
        why = f" ({machine.problem})" if machine.problem else ""
        return f"CUDA sees no GPU{why}", _remedy(machine.problem)
    missing = missing_code(machine, machine.gpus[min(index, len(machine.gpus) - 1)])
    if missing:
        return missing, "use a GPU of these, or build fbgemm for this one"
    return None


def choose(wanted: DeviceName, machine: Machine, local_rank: int = 0, local_world_size: int = 1) -> Choice:
    """Where a rank computes.

    One GPU that all ranks of a node see is each one's device 0: either each sees another one, as under Slurm
    with a GPU a task, or they share it, which `check_together` finds out.

    Args:
        wanted: `train.device`; local_rank, local_world_size: of the ranks of this node.

    Raises:
        ConfigError: CUDA is asked for and impossible, or there are more ranks than GPUs.
    """
    cpu = torch.device("cpu")
    if wanted == "cpu":
        return Choice(cpu)
    visible = len(machine.gpus)
    index = 0 if visible == 1 else local_rank
    problem = obstacle(machine, index)
    if problem is None:
        if index >= visible:
            raise ConfigError(
                f"local rank {local_rank} of {local_world_size} has no GPU: {visible} are visible; start one "
                f'rank a GPU (-j 1x{visible}, make train NPROC={visible}), or set train.device = "cpu"'
            )
        return Choice(torch.device("cuda", index))
    what, remedy = problem
    if wanted == "cuda":
        raise ConfigError(
            f'train.device = "cuda" is not possible here: {what}; {remedy}; the CPU is taken by '
            'train.device = "cpu", in evaluate and export by --device cpu'
        )
    # Where nobody has a GPU, nobody misses one.
    expected = machine.gpus or machine.boards or machine.fbgemm in ("cuda", "both")
    return Choice(cpu, f"{_ON_CPU}{what}; {remedy}; {USE_CPU}" if expected else "")


@dataclass(frozen=True)
class DeviceReport:
    """What a rank tells the others before they meet.

    Attributes:
        rank: of all; kind: `cpu` or `cuda`; gpu: where it is, by host and bus, as NCCL tells them apart.
        why: no GPU was taken; problem: it cannot go on.
    """

    rank: int
    kind: str
    gpu: str = ""
    why: str = ""
    problem: str = ""


def check_together(reports: Sequence[DeviceReport]) -> None:
    """Whether these ranks can work together; the same answer on all of them.

    Raises:
        ConfigError: a rank cannot go on, some took GPUs and others did not, or two share one.
    """
    for one in reports:
        if one.problem:
            # Of another one, maybe on another node, it would tell nothing without its number.
            alone = any(each.problem != one.problem for each in reports)
            raise ConfigError(f"rank {one.rank}: {one.problem}" if alone else one.problem)
    for one in reports:
        if one.kind != reports[0].kind:
            on_cpu = next(each for each in reports if each.kind == "cpu")
            why = on_cpu.why.removeprefix(_ON_CPU).removesuffix(f"; {USE_CPU}")
            raise ConfigError(
                f"rank {reports[0].rank} takes {reports[0].kind} and rank {one.rank} {one.kind}"
                f"{f' ({why})' if why else ''}; make the nodes alike, or set train.device"
            )
    seen: dict[str, int] = {}
    for one in reports:
        if one.gpu in seen:
            host, _, bus = one.gpu.partition(" ")
            raise ConfigError(
                f"ranks {seen[one.gpu]} and {one.rank} would share one GPU ({bus} of {host.split('/')[0]}), "
                "which NCCL refuses: start one rank a GPU (-j 1x1, make train NPROC=1), or set "
                'train.device = "cpu"'
            )
        if one.gpu:
            seen[one.gpu] = one.rank


def agree(store: dist.Store, mine: DeviceReport, world_size: int) -> None:
    """Tell the other ranks what this one took, and compare; collective.

    Raises:
        ConfigError: see `check_together`.
    """
    store.set(f"device/{mine.rank}", json.dumps(asdict(mine)))
    reports = [DeviceReport(**json.loads(store.get(f"device/{rank}"))) for rank in range(world_size)]
    try:
        check_together(reports)
    except ConfigError:
        # The store may go with rank 0, which then must not end before all others know.
        store.set(f"heard/{mine.rank}", "")
        others, end = [f"heard/{rank}" for rank in range(1, world_size)], time.monotonic() + _HEAR_S
        while mine.rank == 0 and others and not store.check(others) and time.monotonic() < end:
            time.sleep(_LOOK_S)
        raise


def gpu_place(index: int) -> str:
    """Host and bus of a GPU; NCCL takes two ranks with the same for ranks on one GPU (`getHostHash`)."""
    gpu: Any = torch.cuda.get_device_properties(index)
    host = this_machine()
    # Torch's stubs do not promise these.
    bus = [getattr(gpu, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in bus:
        return f"{host} {gpu.uuid}"
    return f"{host} {bus[0]:04x}:{bus[1]:02x}:{bus[2]:02x}"


def observe() -> Machine:
    """Look at the real machine; makes no CUDA context. Imports fbgemm where only that knows its build."""
    versions = {name: installed(name) for name in (CPU_FBGEMM, CUDA_FBGEMM)}
    gpus: tuple[Gpu, ...] = ()
    problem = variant = ""
    if torch.version.cuda is not None:
        with warnings.catch_warnings():
            # Says why there is none, the first time that it is asked in a process only.
            warnings.simplefilter("ignore")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        gpus = tuple(Gpu(each.name, (each.major, each.minor)) for each in devices)
        if not gpus:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                # Without the advice that follows the fact.
                problem = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    if not any(versions.values()):
        with suppress(Exception):  # one that does not load is told of by whoever needs it
            import fbgemm_gpu

            variant = str(getattr(fbgemm_gpu, "__variant__", ""))
    return Machine(
        torch_cuda=torch.version.cuda,
        fbgemm=fbgemm_build(versions, variant),
        fbgemm_version=next((version for version in versions.values() if version), ""),
        gpus=gpus,
        torch_arches=tuple(torch.cuda.get_arch_list()) if gpus else (),
        problem=problem,
        boards=sum(node.name[6:].isdigit() for node in Path("/dev").glob("nvidia*")),
    )
