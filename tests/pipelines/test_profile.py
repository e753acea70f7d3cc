"""Which phase of a step a profiler's events belong to."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from pipelines.profile import _OTHER, _phase_of, phase_times
from trainer.loop.validation import VALIDATION


def event(*names: str) -> Any:
    """The innermost of events that lie in each other, the outermost first."""
    found = None
    for name in names:
        found = SimpleNamespace(name=name, cpu_parent=found)
    return found


@pytest.mark.parametrize(
    ("names", "phase"),
    [
        (["## forward ##", "aten::mm"], "forward, rest"),
        (["## forward 12 ##", "aten::mm"], "forward, rest"),
        (["## forward 12 ##", "tandemrec head", "aten::mm"], "head"),
        (["## copy_batch_to_gpu 3 ##", "## next_batch ##", "## read ##", "aten::cat"], "read"),
        (["## copy_batch_to_gpu 3 ##", "aten::copy_"], "forward, rest"),
        (["## start_sparse_data_dist 4 ##", "aten::cumsum"], "exchange"),
        (["## sharded_module_prefetch 4 ##", "fbgemm::lru_cache_populate"], "caches filled ahead"),
        (["## backward 12 ##", "aten::mm"], "backward, dense"),
        (["## optimizer 12 ##", "## check ##", "aten::stack"], "check of gradients"),
        (["## optimizer 12 ##", "## optimizer ##", "aten::_fused_adam_"], "optimizer, dense"),
        (["## optimizer 12 ##", "aten::where"], "optimizer, dense"),
        (["autograd::engine::evaluate_function: AddmmBackward0", "aten::mm"], "backward, dense"),
        (
            ["autograd::engine::evaluate_function: CppNode<SplitLookupFunction_sgd_Op>", "aten::sort"],
            "backward and update of tables",
        ),
        (["aten::mm"], _OTHER),
    ],
)
def test_an_event_belongs_to_the_innermost_range_that_is_known(names: list[str], phase: str) -> None:
    assert _phase_of(event(*names)) == phase


def test_validations_are_no_part_of_steps() -> None:
    kind = torch.autograd.DeviceType.CPU
    facts = {"device_type": kind, "self_cpu_time_total": 1e3, "self_device_time_total": 0.0}
    names = (
        ["## forward 12 ##", "tandemrec head"],
        [VALIDATION, "tandemrec head"],
        [VALIDATION],
    )
    events = [event(*each) for each in names]
    for each in events:
        vars(each).update(facts)
    times = phase_times(events)
    assert {name: phase.cpu for name, phase in times.items()} == {"head": 1.0}


@pytest.mark.parametrize("pipeline", [TrainPipelineSparseDist, PrefetchTrainPipelineSparseDist])
def test_every_range_of_torchrecs_pipelines_is_known(pipeline: type) -> None:
    """By their source, where batches are numbered by an expression in braces."""
    named = set(re.findall(r"record_function\(\s*f?\"(##[^\"]*)\"", inspect.getsource(pipeline)))
    assert len(named) >= 5
    for name in named:
        numbered = re.sub(r"\{[^}]*\}", "7", name)
        # The one surrounds a range of ours, the other is of hooks that nobody registers here.
        if numbered in ("## next_batch ##", "## backward_hook 7 ##"):
            continue
        assert _phase_of(event(numbered)) != _OTHER, name
