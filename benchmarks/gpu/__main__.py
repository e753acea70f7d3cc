"""The check of a GPU, step by step: whether all is right there, and how fast

`tandemrec bench gpu report OUT` makes a page of its results. docs/gpu.md tells all of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.catalogue import choose
from benchmarks.gpu.check import ROOT, Check, no_gpu
from benchmarks.gpu.report import write_page
from benchmarks.gpu.runner import answer_of, run


def _report(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("tandemrec bench gpu report", description=write_page.__doc__)
    parser.add_argument("out", type=Path, help="the folder with results.jsonl")
    parser.add_argument("--to", type=Path, default=ROOT / "benchmarks" / "gpu", help="where the page goes")
    given = parser.parse_args(words)
    try:
        print(write_page(given.out, given.to))
    except FileNotFoundError:
        parser.error(f"{given.out} has no results.jsonl: give the folder that the check wrote (--out)")
    return 0


def _check(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("tandemrec bench gpu", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="names, or right, or speed; none: all")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument(
        "--budget", type=float, default=1200, metavar="S", help="seconds of all steps together (1200)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go; runs/gpu, or runs/gpu-dry")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs and logs go; OUT-work")
    parser.add_argument(
        "--log", type=Path, metavar="DIR", help="a log of Complete Journey, for the step demo"
    )
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    try:
        names = choose(given.steps)
    except ValueError as error:
        parser.error(str(error))
    if not (given.dry or given.one) and (why := no_gpu()):
        # A CPU beside a CPU would be found equal, and be taken for an answer.
        parser.error(f"there is no GPU to check: {why}; --dry runs the same steps on a CPU, tiny")
    # Apart, since a dry run's logs and results must not be taken for others.
    out = given.out or Path("runs/gpu-dry" if given.dry else "runs/gpu")
    check = Check(given.dry, out, given.work or out.with_name(f"{out.name}-work"), given.log)
    return answer_of(check, names[0]) if given.one else int(run(check, names, given.budget, words) > 0)


def main(words: Sequence[str]) -> int:
    return _report(words[1:]) if words[:1] == ["report"] else _check(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
