"""`tandemrec plan`: the sharding plan for a cluster nobody has booked yet; no GPU, no process group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from embeddings.errors import ConfigError
from embeddings.planning import offline_plan, placements
from pipelines.console import quiet_third_parties
from pipelines.train import plan_lines
from trainer.assemble import build_trainable
from trainer.config import load_config
from trainer.data.schema import read_manifest

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def plan(config: Path, overrides: Sequence[str], world_size: int, hbm: str | None) -> None:
    """Print where the tables of `config` would lie on `world_size` GPUs of `hbm` memory each (CPU without).

    Raises:
        ConfigError: the tables do not fit, or the config is wrong.
    """
    quiet_third_parties()
    settings = load_config(config, overrides)
    manifest = read_manifest(settings.data.log)
    model, groups = build_trainable(settings, manifest, torch.device("meta"))
    device = "cpu" if hbm is None else "cuda"
    memory = None if hbm is None else parse_size(hbm)
    found = offline_plan(model, groups.values(), device, world_size, memory)
    print("\n".join(plan_lines(placements(found, groups.values()), world_size)))


def parse_size(text: str) -> int:
    """`141GB` -> bytes; MB, GB, TB and MiB, GiB, TiB are known."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"--hbm {text}: write a number and a unit, such as 141GB or 80GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
