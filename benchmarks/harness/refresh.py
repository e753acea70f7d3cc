"""Runs the commands that benchmarks/*.md name, and puts into the pages what they print (`make bench`).

    python -m benchmarks.harness.refresh [--log runs/demo/log] [--results runs/bench] [PAGE.md ...]

A page marks the places for figures of this very machine:

    <!-- measured by: tandemrec bench search --repeats 3 --json {json} -->
    ```text
    whatever the command printed when it was last run
    ```
    <!-- drawn by: tandemrec bench scaling --draw {json} --image benchmarks/images/scaling.png -->

`{json}` is a file of the page's own in the results folder, `{log}` the sequence log. Everything runs one
after the other, in the checkout. A command that fails leaves its place as it was, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
ROOT = FOLDER.parent
_PLACE = re.compile(
    r"<!-- measured by: (?P<command>[^\n]+) -->\n```text\n(?P<old>.*?)```\n"
    r"(?:<!-- drawn by: (?P<plot>[^\n]+) -->\n)?",
    re.DOTALL,
)


def refresh(page: Path, log: Path, results: Path) -> int:
    """Replace the output in every place of a page; returns how many commands failed."""
    results.mkdir(parents=True, exist_ok=True)
    names = {"{json}": str((results / f"{page.stem}.json").absolute()), "{log}": str(log.absolute())}
    failed = 0
    for place in list(_PLACE.finditer(page.read_text(encoding="utf-8"))):
        printed = _run(place["command"], names)
        if printed is None or (place["plot"] and _run(place["plot"], names) is None):
            failed += 1
            continue
        new = place[0].replace(f"```text\n{place['old']}```", f"```text\n{_without_paths(printed, names)}```")
        # Read anew: a command may write into the page itself.
        page.write_text(page.read_text(encoding="utf-8").replace(place[0], new), encoding="utf-8")
    return failed


def _run(command: str, names: dict[str, str]) -> str | None:
    """The output of a command, or None if it failed."""
    words = shlex.split(command)
    if words[0] == "tandemrec":
        words[:1] = [sys.executable, "-m", "launch.cli"]
    elif words[0] == "python":
        words[0] = sys.executable
    for name, meant in names.items():
        words = [word.replace(name, meant) for word in words]
    print(f"{command} ...", flush=True)
    started = time.monotonic()
    # One thread: all timings are of one, and two ranks would share the cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(f"  {time.monotonic() - started:.0f} s, exit code {done.returncode}", flush=True)
    return done.stdout if done.returncode == 0 else None


def _without_paths(printed: str, names: dict[str, str]) -> str:
    """The output without this machine's paths, which mean nothing to a reader."""
    for name, meant in names.items():
        printed = printed.replace(meant, name.strip("{}").upper())
    return printed.replace(str(ROOT), ".").strip("\n") + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("pages", nargs="*", type=Path, help="default: all of benchmarks/")
    options.add_argument("--log", type=Path, default=Path("runs/demo/log"), help="of `make train`")
    options.add_argument("--results", type=Path, default=Path("runs/bench"), help="where JSON files go")
    given = options.parse_args()
    if not (given.log / "manifest.json").exists():
        print(
            f"{given.log} is no sequence log; run `make train` first, or name one with --log", file=sys.stderr
        )
        return 2
    pages = given.pages or sorted(FOLDER.glob("*.md"))
    failed = sum(refresh(page, given.log, given.results) for page in pages)
    if failed:
        print(f"{failed} command(s) failed; what they should have renewed is as it was", file=sys.stderr)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
