"""The packages that the steps import, with the versions that this project pins, as lines for pip.

    python -m benchmarks.gpu.needs [--has NAME...]

torch, fbgemm and torchrec are left out: which of them go together depends on the machine that the check is
taken to. So is what that machine has already (--has).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterable, Sequence

from benchmarks.gpu.catalogue import STEPS
from benchmarks.gpu.check import ROOT
from benchmarks.gpu.runner import quiet

# Imported when they are needed, not when a step's module is.
_LATER = ("torch.utils.tensorboard", "pytest", "pytest_timeout", "hypothesis")
_PAIRED = re.compile(r"torch|torchrec|fbgemm-gpu.*|nvidia-.*|triton")
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==\S+")


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Name -> `name==version` of the requirement files."""
    found = {}
    for file in ("common", "dev"):
        for line in (ROOT / "requirements" / f"{file}.txt").read_text(encoding="utf-8").splitlines():
            if pin := _PIN.match(line):
                found[normal(pin["name"])] = pin[0]
    return found


def imported_names() -> set[str]:
    """The distributions whose modules are loaded once all steps are."""
    with quiet():
        for module in [*{step.module for step in STEPS.values()}, *_LATER]:
            importlib.import_module(module)
    of_module = importlib.metadata.packages_distributions()
    tops = {name.split(".")[0] for name in sys.modules}
    return {normal(name) for top in tops for name in of_module.get(top, [])}


def requirements(names: Iterable[str], has: Iterable[str]) -> list[str]:
    """Pins of those names that are pinned here and not there already."""
    known, there = pins(), {normal(name) for name in has}
    return [
        known[name]
        for name in sorted(names)
        if name in known and name not in there and not _PAIRED.fullmatch(name)
    ]


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--has", nargs="*", default=[], metavar="NAME")
    print("\n".join(requirements(imported_names(), parser.parse_args(words).has)))


if __name__ == "__main__":
    main(sys.argv[1:])
