"""Every preset over plain tables: the device's logits and gradients against the CPU's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.check import ROOT, Answer, Check, Row, answer, each_way
from benchmarks.gpu.logs import small_log
from benchmarks.gpu.measure import difference, host_waits
from tests.helpers.models import model_of
from tests.programs.preset_steps import small_config
from trainer.assemble import feature_rows, resolve_groups
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.model.frame import TwoStageModel
from trainer.objectives.bce import loss_sum
from trainer.run_config import Config

_LOGITS, _GRADIENTS = 1e-4, 1e-2
# They need a log with clusters, with conversions, or with domains.
_LEFT_OUT = ("twin_v2", "esmm", "crocodile", "d_train", "d_train_joint", "d_train_pooled")


def preset_names() -> list[str]:
    return sorted(
        path.stem
        for path in (ROOT / "configs").glob("*.toml")
        if "extends" in path.read_text(encoding="utf-8") and path.stem not in _LEFT_OUT
    )


def presets(check: Check) -> Answer:
    """Whether every preset's model computes on the device what it does on the CPU, and how often the host
    waits for the device in a forward and backward pass (by line in the facts).

    Expected: logits within 1e-4, gradients within 1e-2 (by their norm), no wait at all.
    """
    lines: Counter[str] = Counter()

    def compare(name: str) -> Row:
        row, waited = compare_devices(small_config(name, small_log(check)), check.device)
        lines.update(waited)
        return row

    names = preset_names()[: check.size(100, 2)]
    rows = each_way({name: name for name in names}, compare, key="preset")
    bad = [r["preset"] for r in rows if "error" in r or r["logits"] > _LOGITS or r["gradients"] > _GRADIENTS]
    return answer(rows, bad, **{f"waits at {line}": times for line, times in lines.most_common(20)})


def compare_devices(config: Config, device: torch.device) -> tuple[Row, Counter[str]]:
    """One training batch on both devices; -> differences, and the waits on the device by line."""
    model, batch = model_of(config), batch_of(config)
    wanted = _learn(model, batch)
    model.to(device)
    # Its copy to the device is the loader's, not the model's.
    moved = batch.to(device)
    # The first pass on a device waits for what later ones find: handles of libraries, compiled kernels.
    _learn(model, moved)
    with host_waits() as waited:
        found = _learn(model, moved)
    logits, gradients = (difference(found[0], wanted[0]), _worst(found[1], wanted[1]))
    row = {
        "logits": logits,
        "gradients": gradients[0],
        "worst in": gradients[1],
        "waits": sum(waited.values()),
    }
    return row, waited


def batch_of(config: Config) -> RequestBatch:
    manifest = read_manifest(Path(config.data.log))
    rows, tasks = feature_rows(resolve_groups(config, manifest)), resolve_tasks(config.tasks, manifest.tasks)
    return next(iter(SequenceLogReader(config.data, "train", rows, tasks=tasks, seed=1).steps())).batch


def _learn(model: TwoStageModel, batch: RequestBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and all gradients, where the model is."""
    model.train().zero_grad()
    prediction = model(batch)
    total = loss_sum(prediction.logits, batch.labels, batch.weight)
    if prediction.auxiliary is not None:
        total = total + loss_sum(prediction.auxiliary, batch.labels, batch.weight)
    total.backward()
    # Copies, for the model itself moves to another device.
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return prediction.logits.detach(), grads


def _worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    return max((difference(found[name], gradient), name) for name, gradient in wanted.items())
