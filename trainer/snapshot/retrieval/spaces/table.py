"""All spaces by name, and the one that is asked for."""

from __future__ import annotations

from embeddings.errors import ConfigError, hint_of
from trainer.snapshot.loading import Snapshot
from trainer.snapshot.retrieval.spaces.attention import AttentionSpace, QuerySpace
from trainer.snapshot.retrieval.spaces.representation import RepresentationSpace
from trainer.snapshot.retrieval.spaces.retrieval_head import RetrievalSpace
from trainer.snapshot.retrieval.spaces.space import Space
from trainer.snapshot.retrieval.spaces.towers import TowersSpace

SPACES: dict[str, type[Space]] = {
    kind.name: kind for kind in (AttentionSpace, QuerySpace, RepresentationSpace, TowersSpace, RetrievalSpace)
}


def open_space(snapshot: Snapshot, name: str, branch: str = "main", task: str = "") -> Space:
    """The space of a snapshot's model; `task` empty: the first one.

    Raises:
        ConfigError: there is no such space, branch or task, or the model has nothing to put in it.
    """
    if name not in SPACES:
        known_names = ", ".join(SPACES)
        raise ConfigError(f"--space {name}: {hint_of(name, SPACES, f'there are {known_names}')}")
    for option, given, known in (
        ("branch", branch, list(snapshot.model.branches.named())),
        ("task", task or snapshot.manifest.tasks[0], list(snapshot.manifest.tasks)),
    ):
        if given not in known:
            raise ConfigError(f"--{option} {given}: the model has {', '.join(known)}")
    chosen = task or snapshot.manifest.tasks[0]
    problem = SPACES[name].problem(snapshot, branch, chosen)
    if problem:
        raise ConfigError(f"--space {name}: {snapshot.path}: {problem}")
    return SPACES[name](snapshot, branch, chosen)
