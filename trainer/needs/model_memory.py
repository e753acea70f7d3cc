"""Refuses a model whose settings ask for more memory than there is, before any of it is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from embeddings.errors import ConfigError
from trainer.config.model import section_of
from trainer.ranks.machine import memory_bytes
from trainer.run_config import Config
from trainer.step_size import StepSize

# A weight in training: itself, its gradient and Adam's two means.
_TIMES_TRAINED = 4
# Part of a tensor's name -> the settings that its size comes from; the first that fits.
_SETTINGS = (
    (".mixer.gates.", "model.mixer.hidden, model.experts.hidden, groups.<name>.dim"),
    (".banks.", "model.experts.hidden, groups.<name>.dim"),
    ("gate", "model.towers.gate_hidden, model.hidden, groups.<name>.dim"),
    ("head.towers.", "model.hidden, tasks.<name>.tower, model.experts.hidden"),
    ("head.", "model.hidden, groups.<name>.dim"),
    ("auxiliary", "model.auxiliary_hidden"),
    ("time", "data.history_length, model.time_dim"),
    ("bias", "data.history_length, model.time_dim"),
    ("planes", "model.hashes, model.hash_bits"),
    ("scorer", "model.score_hidden, model.heads, model.head_dim"),
    ("search", "model.head_dim"),
    ("", "model.layers, model.heads, model.head_dim, groups.<name>.dim"),
)


def check_dense(build: Callable[[], nn.Module]) -> None:
    """Compare the dense part of a model with the memory that this process may take; `build` makes it.

    Raises:
        ConfigError: it does not fit; names the largest tensor and the settings behind it.
    """
    with torch.device("meta"):
        model = build()
    named = [*model.named_parameters(), *model.named_buffers()]
    # Tables are no part of it.
    tensors = {name: tensor for name, tensor in named if not name.startswith("collections.")}
    need = _TIMES_TRAINED * sum(tensor.nbytes for tensor in tensors.values())
    limit = memory_bytes()
    if need <= limit:
        return
    name, largest = max(tensors.items(), key=lambda item: item[1].nbytes)
    settings = next(settings for part, settings in _SETTINGS if part in name)
    raise ConfigError(
        f"the dense part of the model takes {need / 1e9:,.1f} GB with gradients and optimizer, this machine "
        f"has {limit / 1e9:,.1f} GB; its largest tensor is {name} {list(largest.shape)}, "
        f"{largest.nbytes / 1e9:,.2f} GB: make {settings} smaller"
    )


def check_step(config: Config, size: StepSize, ranks: int, memory: int) -> None:
    """Compare what the sequence models make of a step with a rank's memory.

    Raises:
        ConfigError: a model does not fit.
    """
    window = min(config.data.history_length, max((behaviors for behaviors, _ in size.blocks), default=1))
    requests = -(-size.requests // ranks)
    for branch, settings in config.model.all_branches().items():
        problem = settings.sequence_kind.memory_problem(
            settings, section_of(branch), window, requests, memory
        )
        if problem:
            raise ConfigError(problem)
