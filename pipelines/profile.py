"""`tandemrec train --profile`: a trace of some steps, and a table of where their time went."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torchrec.distributed.model_parallel import DistributedModelParallel

from pipelines.console import table_lines
from trainer.loop.validation import VALIDATION
from trainer.ranks.process_group import Ranks
from trainer.sealed_folder import write_text
from trainer.storage import is_remote
from trainer.storage.objects import uploading

# Steps before the first that counts: buffers, kernels' first calls and the reader's start are in them.
WARM, STEPS = 10, 20
_OTHER = "other"
# First match wins: ranges that update.step, loop.pipeline, TorchRec and this file name. TorchRec's
# `sparse_dist` numbers its batches: `## forward 12 ##`.
_PHASES = (
    (r"(c10d::|gloo:|nccl:|## (all2all|variable_batch_all2all|reduce_scatter|all_gather|All))", "exchange"),
    (r"\[(input_dist|output_dist)[a-z_]*\]_", "exchange"),
    (r"\[lookup\]_\[collections\.(?P<group>\w+)\]", "lookup"),
    (r"tandemrec collections\.(?P<group>\w+)", "lookup"),
    (r"tandemrec branches", "search"),
    (r"tandemrec (pooling|auxiliary)", "sequence model"),
    (r"tandemrec head", "head"),
    (r"## (start|wait)_sparse_data_dist\b", "exchange"),
    (r"## sharded_module_prefetch\b", "caches filled ahead"),
    (r"## read ##", "read"),
    (
        r"## (copy_batch_to_gpu|inplace_copy_batch_to_gpu|wait_for_batch|zero_grad|forward)( \d+)? ##",
        "forward, rest",
    ),
    (r"## backward( \d+)? ##", "backward, dense"),
    (r"## check ##", "check of gradients"),
    (r"## tables ##", "backward and update of tables"),
    (r"## optimizer( \d+)? ##", "optimizer, dense"),
    # On a device they run in autograd's thread, outside of all ranges; so does the rest of a backward pass.
    (r"autograd::engine.*SplitLookup", "backward and update of tables"),
)
_RANGES = [(re.compile(pattern), phase) for pattern, phase in _PHASES]
_MODULES = re.compile(r"branches|pooling|auxiliary|head|collections\.\w+")


@dataclass
class PhaseTime:
    """What one phase took over all profiled steps, in milliseconds; operators by their own time."""

    cpu: float = 0.0
    device: float = 0.0
    operators: dict[str, float] = field(default_factory=lambda: defaultdict(float))


class StepProfile:
    """Profiles steps `WARM` + 1 to `WARM` + `STEPS` of this start of a run.

    `after_step` is to be called after each step, `close` at the end. Every rank writes
    RUN/profile/rank-R.json.gz (for ui.perfetto.dev) and rank-R.txt; rank 0's table is printed.

    Args:
        model: sharded; run: the run folder; ranks: this rank's place; say: prints on rank 0.
    """

    def __init__(
        self, model: DistributedModelParallel, run: Path, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self._model, self._folder, self._ranks, self._say = model, run / "profile", ranks, say
        self._steps = 0
        self._open: ExitStack | None = None
        self._profile: Any = None

    def after_step(self, number: int) -> None:
        """`number` is not needed: what counts are the steps of this start."""
        self._steps += 1
        if self._steps == WARM:
            self._folder.mkdir(parents=True, exist_ok=True)
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if self._ranks.device.type == "cuda" else []
            self._open = ExitStack()
            self._open.enter_context(named_modules(self._model.module))
            self._profile = self._open.enter_context(profile(activities=kinds))
        elif self._steps == WARM + STEPS:
            self.close()

    def close(self) -> None:
        """Write what was profiled so far; nothing where nothing runs."""
        if self._open is None:
            if self._steps < WARM:
                self._say(f"no profile: it begins after {WARM} steps, and there were {self._steps}")
            return
        self._open.close()
        self._open = None
        steps = self._steps - WARM
        if steps == 0:
            return
        name = f"rank-{self._ranks.rank}"
        trace = self._folder / f"{name}.json.gz"
        with uploading(trace) if is_remote(trace) else nullcontext(trace) as file:
            self._profile.export_chrome_trace(str(file))
        text = "\n".join(report(phase_times(self._profile.events()), steps))
        write_text(self._folder / f"{name}.txt", text + "\n")
        self._say(f"{text}\ntrace of {steps} steps: {trace} (open it in ui.perfetto.dev)")


@contextmanager
def named_modules(model: nn.Module) -> Iterator[None]:
    """Within this context a model's lookups, search, sequence model and head are ranges of their own."""
    ranges: dict[str, list[Any]] = defaultdict(list)
    modules = {name: module for name, module in model.named_modules() if _MODULES.fullmatch(name)}
    with ExitStack() as handles:
        for name, module in modules.items():

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                opened = record_function(f"tandemrec {name}")
                opened.__enter__()
                ranges[name].append(opened)

            def leave(_: nn.Module, __: Any, ___: Any, name: str = name) -> None:
                ranges[name].pop().__exit__(None, None, None)

            handles.callback(module.register_forward_pre_hook(enter).remove)
            handles.callback(module.register_forward_hook(leave).remove)
        yield


def phase_times(events: Iterable[Any]) -> dict[str, PhaseTime]:
    """Own times of a profiler's events, summed by the innermost range that an event lies in."""
    times: dict[str, PhaseTime] = defaultdict(PhaseTime)
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU or _of_validation(event):
            continue
        phase = times[_phase_of(event)]
        phase.cpu += event.self_cpu_time_total / 1e3
        phase.device += event.self_device_time_total / 1e3
        phase.operators[event.name] += event.self_cpu_time_total / 1e3
    return dict(times)


def _of_validation(event: Any) -> bool:
    """Whether an event is a part of a validation between two steps, or after the last one."""
    while event is not None and event.name != VALIDATION:
        event = event.cpu_parent
    return event is not None


def _phase_of(event: Any) -> str:
    while event is not None:
        for pattern, phase in _RANGES:
            match = pattern.match(event.name)
            if match:
                group = match.groupdict().get("group")
                return f"{phase} {group}" if group else phase
        # A device's backward pass runs in a thread of its own, outside of all ranges.
        if event.cpu_parent is None and event.name.startswith("autograd::engine"):
            return "backward, dense"
        event = event.cpu_parent
    return _OTHER


def report(phases: dict[str, PhaseTime], steps: int) -> list[str]:
    """The table, longest phase first."""
    device = any(phase.device for phase in phases.values())
    total = sum(phase.cpu for phase in phases.values())
    head = ["phase", "ms/step", "share", *(["device ms/step"] if device else []), "most of it in"]
    rows = []
    for name, phase in sorted(phases.items(), key=lambda entry: -max(entry[1].cpu, entry[1].device)):
        most = sorted(phase.operators.items(), key=lambda entry: -entry[1])[:3]
        cells = [name, f"{phase.cpu / steps:.2f}", f"{phase.cpu / total:.1%}"]
        cells += [f"{phase.device / steps:.2f}"] if device else []
        names = ", ".join(f"{operator[:36]} {time / steps:.2f}" for operator, time in most)
        rows.append([*cells, names])
    width = max(len(row[-1]) for row in [head, *rows])
    aligned = [[*row[:-1], row[-1].ljust(width)] for row in [head, *rows]]
    lines = table_lines(aligned[0], aligned[1:])
    return [f"where {steps} steps went: own time of every phase, {total / steps:.2f} ms a step", *lines]
