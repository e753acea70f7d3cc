"""`tandemrec plan`: the sharding plan for a cluster nobody has booked yet; no GPU, no process group."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
from pydantic import ByteSize, TypeAdapter

from embeddings.errors import ConfigError
from embeddings.plan.file import to_tree
from embeddings.plan.memory import gigabytes
from embeddings.plan.planner import DoesNotFit, offline_plan, saved_plan
from embeddings.plan.request import Cluster, PlanRequest
from pipelines.console import quiet_third_parties
from pipelines.plan.needs import all_needs, need_table, needs_tree
from pipelines.plan.remedies import remedies
from pipelines.plan.report import Report, need_lines, report_lines
from trainer.assemble import build_trainable, fit_caches, plan_request, room_for_tables, run_of
from trainer.log.schema import LogManifest, read_manifest
from trainer.model.frame import TwoStageModel
from trainer.ranks.device import DeviceName
from trainer.run_config import Config, load_config, of_files
from trainer.sealed_folder import write_text
from trainer.snapshot.writing import int8_lines
from trainer.step_size import StepSize, lookups, step_size

# Of what pydantic takes for a size only what cannot be meant otherwise: it reads 12 as twelve bytes.
_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[MGT]I?B\s*", re.IGNORECASE)
_RANKS_A_NODE = 8
_HOST = 128 * 2**30


@dataclass(frozen=True)
class PlanOptions:
    """What the user says of the cluster.

    Attributes:
        world_size: ranks; local_world_size: ranks of a node, 0 = 8 or fewer.
        device: `cpu` or `cuda`, empty = `cuda` where `hbm` is given or train.device says so.
        hbm: memory of a GPU; ddr: memory of a node, for all its ranks; empty = 128 GiB a rank.
        behaviors: of a step, 0 = estimate from the log; out: where the plan is written.
        run: the folder of the run that is planned, whose disk is looked at; None = none.
    """

    world_size: int
    local_world_size: int = 0
    device: str = ""
    hbm: str = ""
    ddr: str = ""
    behaviors: int = 0
    out: Path | None = None
    run: Path | None = None


def plan(config: Path, overrides: Sequence[str], options: PlanOptions) -> None:
    """Print where the tables of `config` would lie, what each rank holds and what a step sends.

    Raises:
        ConfigError: the tables do not fit (what would make them fit is printed), or the config is wrong.
    """
    quiet_third_parties()
    settings = load_config(config, overrides)
    cluster = cluster_of(options, settings.train.device)
    manifest = read_manifest(settings.data.log)
    size = step_size(settings.data, manifest, options.behaviors or None)
    # Of tables in mapped files, the disk of this machine stands for those of the nodes.
    memory, cluster = cluster, room_for_tables(cluster, settings)
    mapped = settings.plan.mapped_folder or ""
    with of_files(config, overrides):
        request = _request(settings, manifest, cluster, size)
    try:
        found = offline_plan(request)
    except DoesNotFit as problem:
        print("\n".join(need_lines(problem.parts, cluster, mapped)), flush=True)
        tried = remedies(settings, cluster, problem.parts, lambda c, k: _request(c, manifest, k, size))
        print("\n".join(tried), flush=True)
        raise
    # As training will have it, which refuses caches that cannot be filled ahead.
    ahead = settings.train.pipeline == "prefetch"
    assert isinstance(request.model, TwoStageModel)
    saved, _ = fit_caches(saved_plan(request, found.plan), ahead, request.model)
    asked = {
        lookup: lookups(settings, {g.name: g for g in request.groups}, manifest, size, lookup, cluster.device)
        for lookup in ("full", "selected")
    }
    report = Report(found, request, size, asked, settings.model.lookup, mapped)
    run = run_of(settings, manifest, request, size)
    needs = all_needs(run, found, memory, cluster.ddr, options.run)
    print("\n".join([*report_lines(report), "", *need_table(needs, options.run)]))
    for line in int8_lines(request.groups, {group.name: "int8" for group in request.groups}):
        print(fill(line, 108, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False))
    if options.hbm and cluster.device == "cpu":
        print(f"--hbm {options.hbm} has no effect: these ranks have no GPU")
    if not options.ddr:
        print(f"host memory of a node was not given: {gigabytes(_HOST)} a rank is assumed; give --ddr")
    if options.out is not None:
        write_text(options.out, json.dumps({**to_tree(saved), "needs": needs_tree(needs)}, indent=1))
        words = ["--config", str(config), *(word for each in overrides for word in ("--set", each))]
        words += ["--plan", str(options.out), "--out", "RUN" if options.run is None else str(options.run)]
        ranks = f" on {options.world_size} ranks" if options.world_size > 1 else ""
        print(f"plan written to {options.out}; next{ranks}: tandemrec train {shlex.join(words)}")


def cluster_of(options: PlanOptions, trained_on: DeviceName = "auto") -> Cluster:
    """The cluster as the user describes it.

    Args:
        trained_on: `train.device`, which counts where the user says nothing else.

    Raises:
        ConfigError: ranks do not fill the nodes, or no memory is given for a GPU.
    """
    device = options.device or ("cuda" if options.hbm or trained_on == "cuda" else "cpu")
    local = options.local_world_size or min(options.world_size, _RANKS_A_NODE)
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: give cpu or cuda")
    if options.world_size % local:
        raise ConfigError(f"--world-size {options.world_size} is no multiple of --local-world-size {local}")
    if device == "cuda" and not options.hbm:
        asked = "--device cuda" if options.device else 'train.device = "cuda" (without --device cpu)'
        raise ConfigError(f"{asked} needs --hbm, the memory of a GPU, such as --hbm 141GB")
    hbm = parse_size(options.hbm, "--hbm") if device == "cuda" else 0
    ddr = parse_size(options.ddr, "--ddr") // local if options.ddr else _HOST
    return Cluster(device, options.world_size, local, hbm, ddr)


def parse_size(text: str, option: str) -> int:
    """`141GB` -> bytes; MB, GB, TB and MiB, GiB, TiB are known."""
    if not _SIZE.fullmatch(text):
        raise ConfigError(f"{option} {text}: write a number and a unit, such as 141GB or 80GiB")
    return TypeAdapter(ByteSize).validate_python(text)


def _request(config: Config, manifest: LogManifest, cluster: Cluster, size: StepSize) -> PlanRequest:
    built = build_trainable(config, manifest, torch.device("meta"))
    return plan_request(config, manifest, built, cluster, size)
