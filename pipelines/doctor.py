"""Is this environment one that tandemrec can run in? Prints what is installed, names what is wrong.

The checks are pure functions of data (versions, origins, owners), so tests feed them broken
environments; only `observe` looks at the real one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.ranks.device import Machine

OUR_PACKAGES = ("launch", "pipelines", "trainer", "embeddings")
OUR_DISTRIBUTION = "tandemrec"
PROJECT_ROOT = Path(__file__).resolve().parent.parent

# fbgemm's compiled extensions load on one torch release only and torchrec follows fbgemm, but neither
# wheel says so in its metadata: pip cannot see a wrong triple.
SUPPORTED_TRIPLES = (("2.13", "1.8", "1.8"), ("2.11", "1.6", "1.6"))
CPU_FBGEMM = "fbgemm-gpu-cpu"
CUDA_FBGEMM = "fbgemm-gpu"
DRIVER = "install the driver (in a container: start it with its GPUs), or `make clean install DEVICE=cpu`"
REINSTALL = "rebuild the environment: `make clean install DEVICE=cpu` (or DEVICE=cuda)"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where it was seen, and what to do about it."""

    what: str
    where: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


@dataclass(frozen=True)
class Environment:
    """What the checks look at.

    Args:
        versions: distribution name -> version, None where it is not installed.
        torch_cuda: the CUDA release torch was built for, None for a CPU build or without torch.
        fbgemm_error: why `import fbgemm_gpu` failed, None when it worked.
        origins: our package name -> the file or folder it is imported from, None when not found.
        owners: our package name -> the distributions that install a package of this name.
        device: the devices found, in words.
        machine: what a rank chooses its device by; None where torch does not load.
        search: what the search on a CPU is done by, in words.
    """

    versions: Mapping[str, str | None]
    torch_cuda: str | None = None
    fbgemm_error: str | None = None
    origins: Mapping[str, Path | None] = field(default_factory=dict)
    owners: Mapping[str, Sequence[str]] = field(default_factory=dict)
    device: str = ""
    machine: Machine | None = None
    search: str = ""


def check_triple(torch: str | None, torchrec: str | None, fbgemm: str | None) -> Iterator[Problem]:
    """Are the three releases ones that were built for each other? None stands for 'not installed'."""
    releases = {"torch": torch, "torchrec": torchrec, "fbgemm": fbgemm}
    missing = [name for name, version in releases.items() if version is None]
    if missing:
        yield Problem(f"{', '.join(missing)} not installed", "site-packages", REINSTALL)
    elif tuple(".".join(str(each).split(".")[:2]) for each in releases.values()) not in SUPPORTED_TRIPLES:
        known = " or ".join(" / ".join(f"{part}.x" for part in triple) for triple in SUPPORTED_TRIPLES)
        yield Problem(
            f"torch {torch}, torchrec {torchrec} and fbgemm {fbgemm} do not go together",
            "site-packages",
            f"supported are torch / torchrec / fbgemm {known}: {REINSTALL}",
        )


def check_fbgemm_build(cpu: str | None, cuda: str | None, torch_cuda: str | None) -> Iterator[Problem]:
    """Exactly one fbgemm build, and one that this torch can load."""
    if cpu is not None and cuda is not None:
        yield Problem(
            f"{CPU_FBGEMM} {cpu} and {CUDA_FBGEMM} {cuda} are both installed and overwrite each other",
            "site-packages/fbgemm_gpu",
            # Uninstalling one of them removes files of the other, so the survivor is reinstalled.
            f"`pip uninstall -y {CPU_FBGEMM} {CUDA_FBGEMM}`, then install the one this machine needs "
            "with `pip install --no-deps`",
        )
    elif cuda is not None and torch_cuda is None:
        yield Problem(
            f"{CUDA_FBGEMM} {cuda} is the CUDA build, torch is a CPU build and cannot load it",
            "site-packages/fbgemm_gpu",
            f"`pip uninstall -y {CUDA_FBGEMM}` and `pip install --no-deps {CPU_FBGEMM}=={cuda}`",
        )


def check_origins(origins: Mapping[str, Path | None], root: Path) -> Iterator[Problem]:
    """Does each of our package names lead to our package, the one under `root`?"""
    for name, origin in origins.items():
        if origin is None:
            yield Problem(f"package '{name}' not found", str(root), REINSTALL)
        elif not origin.is_relative_to(root / name):
            yield Problem(
                f"package '{name}' is imported from here and hides tandemrec's own ({root / name})",
                str(origin),
                "uninstall or rename it, or start tandemrec from another folder: "
                "tandemrec wants an environment of its own",
            )


def check_owners(owners: Mapping[str, Sequence[str]]) -> Iterator[Problem]:
    """Does any other distribution install a package under one of our names?"""
    for name, distributions in owners.items():
        foreign = sorted({dist for dist in distributions if dist.lower() != OUR_DISTRIBUTION})
        if foreign:
            yield Problem(
                f"{', '.join(foreign)} also installs a package called '{name}'",
                "site-packages",
                f"`pip uninstall {' '.join(foreign)}`, then `pip install --no-deps -e .`",
            )


def check(environment: Environment, root: Path = PROJECT_ROOT) -> list[Problem]:
    """All problems of `environment`, causes before their symptoms; empty when it is sound."""
    versions, error = environment.versions, environment.fbgemm_error
    cpu, cuda = versions.get(CPU_FBGEMM), versions.get(CUDA_FBGEMM)
    problems = [*check_triple(versions.get("torch"), versions.get("torchrec"), cpu or cuda)]
    problems += check_fbgemm_build(cpu, cuda, environment.torch_cuda)
    if error is not None and not problems:  # a failing import says nothing new once its cause is named
        of_driver = "libnvidia-ml" in error or "libcuda.so" in error
        what = f"the CUDA build needs an NVIDIA driver ({error})" if of_driver else f"import failed: {error}"
        problems.append(Problem(what, "site-packages/fbgemm_gpu", DRIVER if of_driver else REINSTALL))
    problems += check_origins(environment.origins, root)
    return [*problems, *check_owners(environment.owners)]


def device_notes(machine: Machine) -> list[str]:
    """What training will use on this machine by itself, and why not each GPU; empty where that is plain.

    The functions are those by which ranks choose their device, so both say the same.
    """
    from trainer.ranks.device import choose, obstacle

    visible = len(machine.gpus)
    # Each rank of a node looks at a GPU of its own; one with none that can be used takes the CPU.
    notes = [choose("auto", machine, index, visible).note for index in range(visible or 1)]
    if machine.torch_cuda is not None and obstacle(machine) is None and len(machine.gpus) < machine.boards:
        notes.append(
            f"{machine.boards} NVIDIA devices are there, and {visible} are visible (CUDA_VISIBLE_DEVICES)"
        )
    return list(dict.fromkeys(note for note in notes if note))


def device_words(machine: Machine | None, cores: int | None) -> str:
    """The devices, with the architecture of each GPU, and which of them training takes by itself."""
    cpu = f"cpu ({cores} cores)"
    if machine is None or not machine.gpus:
        return cpu
    gpus = ", ".join(f"{gpu.name}, {gpu.arch}" for gpu in machine.gpus)
    return f"cuda ({gpus}), {cpu}"


def search_words() -> str:
    """What the search of stage one is done by on a CPU."""
    from trainer.model.ops.top_products import kernel

    if (found := kernel()) is not None:
        return f"compiled, {found.lanes} numbers at once"
    return "torch's operators, slower: with a C compiler (cc), `pip install --no-deps -e .` compiles it"


def _origin(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    origin = spec.origin or (folders[0] if folders else None)
    return None if origin is None else Path(origin).resolve()


def observe() -> Environment:
    """Looks at the running interpreter. Imports torch and fbgemm, so it takes a few seconds."""
    shown = ("torch", "torchrec", CPU_FBGEMM, CUDA_FBGEMM, "torchx", "pyarrow", OUR_DISTRIBUTION)
    from trainer.ranks.machine import cores, installed

    machine = None
    with suppress(Exception):  # a torch that does not load is reported by its missing or wrong version
        from trainer.ranks.device import observe as observe_machine

        machine = observe_machine()
    search = ""
    with suppress(Exception):
        search = search_words()
    fbgemm_error = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # For real: undefined symbols show only when the extension is loaded.
            importlib.import_module("fbgemm_gpu")
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        fbgemm_error = f"{type(error).__name__}: {lines[0]}"
    owners = importlib.metadata.packages_distributions()
    return Environment(
        versions={name: installed(name) for name in shown},
        torch_cuda=None if machine is None else machine.torch_cuda,
        fbgemm_error=fbgemm_error,
        origins={name: _origin(name) for name in OUR_PACKAGES},
        owners={name: owners.get(name, []) for name in OUR_PACKAGES},
        device=device_words(machine, cores()),
        machine=machine,
        search=search,
    )


def report_lines(environment: Environment) -> list[str]:
    """The environment, one `name  value` line each."""
    rows = {"python": platform.python_version()}
    rows |= {name: version for name, version in environment.versions.items() if version is not None}
    rows["device"] = environment.device
    if environment.search:
        rows["search on cpu"] = environment.search
    width = max(len(name) for name in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def doctor() -> int:
    """Prints the environment on stdout and each problem as one line on stderr.

    Returns:
        The exit code: 0 when the environment is sound, 2 when there is something to mend.
    """
    environment = observe()
    for line in report_lines(environment):
        print(line)
    problems = check(environment)
    for problem in problems:
        print(f"tandemrec: error: {problem}", file=sys.stderr)
    if problems:
        return 2
    machine, place = environment.machine, ""
    if machine is not None:
        from trainer.ranks.device import choose

        for note in device_notes(machine):
            print(f"note: {note}")
        kind = choose("auto", machine).device.type
        place = f", on {len(machine.gpus)} GPU(s)" if kind == "cuda" else ", on the CPU"
    print(f"ok: this environment can train{place}")
    return 0
