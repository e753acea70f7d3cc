"""The server of a snapshot: its scorer, its users' states, its start, and the server under load (serving.md)

Its parts, each of which --only measures alone:

scorer  times of a request, split into search and ranking, on one thread with random weights
others  other implementations of the same weights
states  users whose states are kept, by the rate of hits
start   of a server on large tables
load    the server beside a bare FastAPI scorer and ONNX Runtime, in closed and open loops

All kinds of a table are measured in turn, in short rounds, so that other work on the machine meets all of
them; rows are medians. Processor seconds are disturbed less than those of the wall, which stand beside them.
--config is a TOML of `ServeBench`, with a section for each part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.serve.load import LoadBench, measure_load
from benchmarks.serve.scorer import ScorerBench, measure_others, measure_scorer, measure_starts
from benchmarks.user_states import UserStateBench, measure_states
from trainer.config.toml import Settings, load_settings


class StatesPart(UserStateBench):
    """The states that servers keep by default, on one thread; `bench user_states` measures the others too."""

    threads: tuple[PositiveInt, ...] = (1,)
    kept: tuple[bool, ...] = (False,)


class ServeBench(Settings):
    """The settings of this benchmark, by part; `others` and `start` have those of `scorer`."""

    scorer: ScorerBench = ScorerBench()
    states: StatesPart = StatesPart()
    load: LoadBench = LoadBench()


Part = Callable[[ServeBench, int, Report], None]
PARTS: dict[str, Part] = {
    "scorer": lambda settings, repeats, report: measure_scorer(settings.scorer, repeats, report),
    "others": lambda settings, repeats, report: measure_others(settings.scorer, repeats, report),
    "states": lambda settings, repeats, report: measure_states(settings.states, repeats, report),
    "start": lambda settings, _, report: measure_starts(settings.scorer, report),
    "load": lambda settings, repeats, report: measure_load(settings.load, repeats, report),
}


def main(words: Sequence[str]) -> None:
    options = Options("serve", __doc__).measuring(config=False)
    text = "measure this part alone; repeatable"
    options.add_argument("--only", action="append", choices=PARTS, help=text)
    given = options.read(words)
    settings = load_settings(ServeBench, given.config, given.overrides)
    report = Report(given, "Serving", seed=0)
    report.facts = settings.model_dump(mode="json")
    for name, measure in PARTS.items():
        if not given.only or name in given.only:
            measure(settings, given.repeats, report)
    report.close()
