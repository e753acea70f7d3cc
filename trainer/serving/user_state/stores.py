"""All kinds of stores. A new kind is a file beside this one and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainer.serving.user_state.redis_store import RedisSettings
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.shared_memory import SharedMemorySettings

AnyStore = Annotated[RedisSettings | SharedMemorySettings, Field(discriminator="kind")]


def open_second_level(settings: AnyStore | None) -> SecondLevel | None:
    """The second level that a config asks for, if it does.

    Raises:
        ConfigError: it cannot be opened. A server that does not answer now is no error: it may later.
    """
    return None if settings is None else SecondLevel(settings.open())
