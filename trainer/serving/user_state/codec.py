"""A user's state as bytes for a store, and what is believed of bytes that come back.

    magic       8 bytes, which name the format
    digest     32 bytes, SHA-256 of all that follows
    content     a safetensors file: `UserState.tensors()`, with the state's key in its metadata

The key is a digest of the snapshot, the settings and the user, so content of another one is no answer.
Nothing of it is code. Whoever uses the state compares its history with that of the request, as ever.
"""

from __future__ import annotations

import hashlib
import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainer.serving.user_state.state import UserState

MAGIC = b"TRUSER01"
_HEAD = len(MAGIC) + hashlib.sha256().digest_size
_KEY = "key"


class ForeignState(Exception):
    """Bytes that are a state, and not the one that was asked for."""


class DamagedState(Exception):
    """Bytes that are no state."""


def encode(state: UserState) -> list[bytes]:
    """A state in parts to be written one behind the other. Its tensors are copied at once."""
    tensors = {name: _alone(part) for name, part in state.tensors().items()}
    content = save(tensors, {_KEY: state.key.hex()})
    return [MAGIC, hashlib.sha256(content).digest(), content]


def _alone(part: Tensor) -> Tensor:
    """The same in memory that is no other tensor's, as safetensors asks for."""
    whole = part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes
    return part if whole else part.clone(memory_format=torch.contiguous_format)


def decode(key: bytes, content: bytes) -> UserState:
    """The state of a key, from what a store has under it.

    Raises:
        DamagedState: it is cut off, changed, or of another format. ForeignState: it is of another key.
    """
    view = memoryview(content)
    if len(view) < _HEAD or view[: len(MAGIC)] != MAGIC:
        raise DamagedState("is no user's state")
    body = view[_HEAD:]
    if hashlib.sha256(body).digest() != view[len(MAGIC) : _HEAD]:
        raise DamagedState("does not match its digest")
    try:
        found = _key_in(body)
        if found != key.hex():
            raise ForeignState("is a state of another user, snapshot or settings")
        return UserState.of(key, load(bytes(body)))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedState(f"is no user's state: {error}") from None


def _key_in(body: memoryview) -> str | None:
    """The key in the metadata of a safetensors file, which its loader does not give."""
    size = int.from_bytes(body[:8], "little")
    header = json.loads(bytes(body[8 : 8 + size]))
    found: str | None = header["__metadata__"][_KEY]
    return found
