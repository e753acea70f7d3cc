"""The section [user_states] of a server's config."""

from __future__ import annotations

from pydantic import ByteSize, Field

from trainer.config.toml import Settings
from trainer.serving.user_state.stores import AnyStore


class UserStateSettings(Settings):
    """What a server keeps of the users whose candidates it scored."""

    bytes: ByteSize = ByteSize(256 << 20)
    """Memory for the states of users that were scored last. 0: none is kept."""
    representation: bool = False
    """Keep the rows of the representation too. A request that finds its user's state then looks no behavior
    up in a table; a state takes several times as much memory, and making it costs half of a request more."""
    least: int = Field(256, ge=1)
    """Behaviors. Users of fewer have no state: making everything again costs less than keeping it."""
    store: AnyStore | None = None
    """Where states lie that several processes share; without it, each has those in its own memory."""
