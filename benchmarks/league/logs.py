"""The logs of the league: made by tandemrec's verbs where they are not there yet."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.league.declared import ROOT, Clustered, Entry, Log
from benchmarks.league.movielens import fetch_movielens
from embeddings.errors import ConfigError, TandemError
from trainer.log.schema import is_sequence_log, read_manifest

SOURCES: dict[str, Callable[[Path], Path]] = {"movielens": fetch_movielens}
"""Raw data that no verb fetches, by name: each writes it into a folder."""
_PLACE = re.compile(r"\{(\w+)\}")


def make_log(name: str, log: Log, out: Path, given: Mapping[str, Path], smoke: bool = False) -> Path:
    """The log of a name, made unless it is there.

    Args:
        out: of the league. given: other places that the verbs name.

    Raises:
        ConfigError: a place is missing, or there is no such source. TandemError: a verb failed.
    """
    place, raw = (out / name / "log").absolute(), (out / "raw" / name).absolute()
    if is_sequence_log(place):
        return place
    places = {"raw": raw, "log": place, **given}
    verbs = [*log.make[:-1], f"{log.make[-1]} {log.smoke if smoke else ''}"]
    words = [words_of(verb, places, f"log {name}") for verb in verbs]
    if log.source:
        if log.source not in SOURCES:
            raise ConfigError(f"log {name}: source = {log.source!r} is not one of {', '.join(SOURCES)}")
        SOURCES[log.source](raw)
    place.parent.mkdir(parents=True, exist_ok=True)
    raw.mkdir(parents=True, exist_ok=True)
    run_verbs(words)
    return place


def make_clustered(clustered: Clustered, name: str, out: Path, run: Path) -> Path:
    """The log with clusters of a run's vectors, made unless it is there."""
    place, raw = (out / name / "clustered").absolute(), (out / "raw" / name).absolute()
    if not is_sequence_log(place):
        log = (out / name / "log").absolute()
        places = {"raw": raw, "log": log, "clustered": place, "run": run.absolute()}
        raw.mkdir(parents=True, exist_ok=True)
        run_verbs([words_of(verb, places, f"clusters of {name}") for verb in clustered.make])
    return place


def words_of(verb: str, places: Mapping[str, Path], what: str) -> list[str]:
    """The words of a verb with its places put in, see `filled`."""
    return [filled(word, places, what) for word in shlex.split(verb)]


def filled(text: str, places: Mapping[str, Path], what: str) -> str:
    """A text with the places put in that it names in braces.

    Raises:
        ConfigError: a place is not given.
    """

    def put(match: re.Match[str]) -> str:
        if match[1] not in places:
            raise ConfigError(f"{what} needs --raw {match[1]}=PLACE")
        return str(places[match[1]])

    return _PLACE.sub(put, text)


def adapted(entries: Sequence[Entry], name: str, out: Path) -> list[Entry]:
    """Presets whose overrides name the log's folder of raw data, with its place."""
    places = {"raw": (out / "raw" / name).absolute()}
    return [
        replace(each, overrides=tuple(filled(text, places, name) for text in each.overrides))
        for each in entries
    ]


def run_verbs(verbs: Sequence[Sequence[str]]) -> None:
    """Run verbs of tandemrec, or scripts of this checkout, in turn, each in a process of its own.

    Raises:
        TandemError: one failed.
    """
    for words in verbs:
        command = words[1:] if words[0] == "python" else ["-m", "launch.cli", *words]
        print(shlex.join(["python", *command]), flush=True)
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            raise TandemError(f"{shlex.join(words[:2])} failed with exit code {done.returncode}, see above")


def overrides_of(log: Log, place: Path) -> list[str]:
    """What every run on a log sets: of a planted log, how many behaviors a request depends on."""
    planted = read_manifest(place).ingest.get("synth", {})
    length = [f"data.history_length={planted['history_length']}"] if "history_length" in planted else []
    return [*length, *log.overrides]
