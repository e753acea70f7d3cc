"""One change at a time: what each of the measures brings that Tencent's paper (arXiv:2510.21714) sums up.

The paper tells of training that is 54.7 % faster by data prefetching, fused kernels and parameter
prefetching, of inference that is 62.5 % faster by mixed precision and a cache of embeddings on the GPU, and
of 5.8 % less memory by a pool that grows. These tables answer with this project's own measures, never with
those numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.caches import CELL, PLACES, TINY, Place, change_of, place_tables, there
from benchmarks.gpu.check import Answer, Check, Row, answer, each_way
from benchmarks.gpu.inputs import draw_steps
from benchmarks.gpu.loops import Loops, Way, loops_of, shares
from benchmarks.gpu.plain_forms import without_kernels
from benchmarks.harness.timing import single_seconds
from trainer.data.batch import pinning
from trainer.data.prefetch import Prefetcher
from trainer.data.reader import Step
from trainer.ranks.process_group import process_group
from trainer.run_config import Config

_AHEAD = 4


@dataclass(frozen=True)
class _TrainingWay:
    """A way to train: where rows lie, the pipeline, whether a thread collates batches ahead, and whether
    operators take kernels of the trainer's own.
    """

    place: str
    kind: str
    ahead: bool
    change: Callable[[Config], Config] = lambda config: config
    kernels: bool = True


def _unfused(config: Config) -> Config:
    """Tables that get a gradient of their whole size, and are updated by an optimizer beside it."""
    groups = {
        name: group.model_copy(update={"sharding": ("data_parallel",)})
        for name, group in config.groups.items()
    }
    return config.model_copy(update={"groups": groups})


_CACHED, _AHEAD_CACHED = "host memory, cache of 0.2", "the same, filled ahead"
PREFETCH: Mapping[str, _TrainingWay] = {
    "cached tables, one after the other": _TrainingWay(_CACHED, "none", False),
    "+ batches collated ahead": _TrainingWay(_CACHED, "none", True),
    "+ copied and exchanged ahead (sparse_dist)": _TrainingWay(_CACHED, "sparse_dist", True),
    "+ rows fetched ahead (prefetch)": _TrainingWay(_AHEAD_CACHED, "prefetch", True),
    "tables in device memory, update not fused": _TrainingWay(
        "device memory", "sparse_dist", True, _unfused, False
    ),
    "+ update fused into the backward pass": _TrainingWay(
        "device memory", "sparse_dist", True, kernels=False
    ),
    "+ kernels of stage one and of what is kept": _TrainingWay("device memory", "sparse_dist", True),
}


def prefetch(check: Check) -> Answer:
    """What prefetching of data, of exchanged ids and of parameters brings to training, one after the other,
    and what fusion brings: of the update with the backward pass, and of operators in kernels.

    Expected: every line of the first four is faster than the one before; the fused update is several times
    faster than one over whole tables.
    """
    ways = {name: way for name, way in PREFETCH.items() if there(check, PLACES[way.place])}
    with process_group(60) as ranks:
        return _table(each_way(ways, lambda way: _stream(check, way, ranks), partial(_keep, check)))


def _stream(check: Check, way: _TrainingWay, ranks: Any) -> Row:
    """Steps that are collated while training goes on, as a reader does."""
    place, cell = PLACES[way.place], CELL if check.on_cuda else TINY
    rows = list(draw_steps(cell, check.size(6, 2), pinning(ranks.device)))

    def change(config: Config) -> Config:
        return way.change(change_of(place)(config))

    forms = nullcontext() if way.kernels else without_kernels()
    with forms, place_tables(place), loops_of(cell, ranks, count=1, change=change) as loops:
        pipeline = loops.pipeline(Way(way.kind))

        def run() -> None:
            drawn = (draw() for draw in rows)
            steps: Iterator[Step] = Prefetcher(drawn, _AHEAD) if way.ahead else drawn
            deque(pipeline.train(steps), maxlen=0)

        taken = single_seconds(run, check.size(3, 1)) / len(rows)
        return {"ms": 1000 * taken, "samples/s": loops.candidates / taken}


def precision(check: Check) -> Answer:
    """What mixed precision and rows on the device bring to inference: forward passes alone, from rows in host
    memory and fp32 on, one change at a time.

    Expected: every line is faster than the first; rows in device memory are the fastest.
    """
    ways: Mapping[str, tuple[str, bool]] = {
        "rows in host memory, fp32": ("host memory", False),
        "+ a cache on the device": ("host memory, cache of 0.2", False),
        "+ bf16": ("host memory, cache of 0.2", True),
        "rows in device memory, fp32": ("device memory", False),
        "rows in device memory, bf16": ("device memory", True),
    }
    ways = {name: way for name, way in ways.items() if there(check, PLACES[way[0]])}
    with process_group(60) as ranks:
        return _table(
            each_way(ways, lambda way: _score(check, PLACES[way[0]], way[1], ranks), partial(_keep, check))
        )


def _score(check: Check, place: Place, bf16: bool, ranks: Any) -> Row:
    cell = CELL if check.on_cuda else TINY
    sizes = {"count": check.size(4, 2), "rounds": check.size(3, 1)}
    with place_tables(place), loops_of(cell, ranks, change=change_of(place), **sizes) as loops:
        found: Loops = loops
        return found.score_steps(bf16)


def _keep(check: Check, rows: list[Row]) -> None:
    check.keep(_table(rows))


def _table(rows: list[Row]) -> Answer:
    failed = [row["way"] for row in rows if "error" in row]
    return answer(shares(rows), failed)
