"""A run read at another history length than it was trained at."""

from __future__ import annotations

import torch

from embeddings.errors import ConfigError
from trainer.assemble import build_model, count_numbers, resolve_groups
from trainer.config.model import section_of
from trainer.config.tasks import resolve_tasks
from trainer.log.schema import LogManifest
from trainer.run_config import Config


def at_length(config: Config, manifest: LogManifest, length: int) -> Config:
    """The config of a run with another `data.history_length`, where neither weights nor scales depend on it.

    Args:
        manifest: of the run's log; length: L; 0 = that of the run.

    Raises:
        ConfigError: a weight has a row for each place of the history, so that there are none beyond it, or
            a sequence model divides by the length.
    """
    trained = config.data.history_length
    if length in (0, trained):
        return config
    settings = config.model_dump()
    settings["data"]["history_length"] = length
    other = Config.model_validate(settings)
    before, after = (_shapes(each, manifest) for each in (config, other))
    fixed = [name for name, shape in before.items() if after[name] != shape]
    if fixed:
        raise ConfigError(
            f"--history-length {length}: {fixed[0]} has a row for each of the {trained} places of the "
            "history that this run was trained at; a model without ranks (model.position = false, and no "
            "sasrec) can be read at another length"
        )
    for name, branch in config.model.all_branches().items():
        if branch.sequence_kind.scales_by_longest and not branch.newest:
            raise ConfigError(
                f'--history-length {length}: {section_of(name)}.sequence = "{branch.sequence}" divides by '
                f"the {trained} behaviors of the longest window that this run was trained at, so that every "
                'score would be another one; only a branch with search = "recent" can be read at another '
                "length"
            )
    return other


def _shapes(config: Config, manifest: LogManifest) -> dict[str, torch.Size]:
    """Shapes of all weights but those of the tables, by their names; nothing takes memory."""
    groups, tasks = resolve_groups(config, manifest), resolve_tasks(config.tasks, manifest.tasks)
    with torch.device("meta"):
        model = build_model(config, groups, {}, tasks, count_numbers(config, manifest.numeric))
    return {name: tensor.shape for name, tensor in model.dense_tensors().items()}
