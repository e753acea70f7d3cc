"""The second level of user states: those that another process made, or that were dropped in this one.

A store holds bytes under keys and knows nothing of what they mean. `trainer.serving.user_state.codec` makes
bytes of a state and verifies what comes back. `trainer.serving.user_state.guarded` keeps the failures of a
store away from requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StateStore(Protocol):
    """Bytes under keys, shared by several processes; safe to call from several threads.

    An entry may be gone at any time, replaced by another process, or damaged: whoever reads verifies.
    """

    def get(self, key: bytes) -> bytes | None:
        """What lies under a key; None where nothing does.

        Args:
            key: a digest of the snapshot, the settings and the user, `UserState.key`.

        Raises:
            UnavailableError: the store fails now. `GuardedStore` never raises.
        """
        ...

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None:
        """Replace what lies under a key by these parts, one behind the other.

        The store may keep or drop it as it likes. Nobody may change the parts before the call returns;
        `GuardedStore` keeps them for longer, since it writes later.

        Raises:
            UnavailableError: as `get`.
        """
        ...

    def close(self) -> None:
        """Give up connections and files; what was put stays there for others."""
        ...
