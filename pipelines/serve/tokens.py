"""Tokens that clients must bring, each from a file that others cannot read."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from pathlib import Path

from fastapi import Request

from embeddings.errors import ConfigError
from trainer.serving.request import RequestError


class Token:
    """What a client must bring for some paths. The file is read again when it changes.

    Args:
        say: gets one line where the file has changed and cannot be read; the old token stays then.

    Raises:
        ConfigError: the file is missing, or its token is too short to be secret.
    """

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        self._file, self._say = file, say
        self._seen = _state_of(file)
        self._token = read_token(file)

    def is_in(self, authorization: str) -> bool:
        """Whether this is `Bearer TOKEN`. The time that it takes tells nothing of the token."""
        self._follow()
        return hmac.compare_digest(authorization.encode(), f"Bearer {self._token}".encode())

    def _follow(self) -> None:
        state = _state_of(self._file)
        if state == self._seen:
            return
        self._seen = state
        try:
            self._token = read_token(self._file)
        except ConfigError as error:
            self._say(f"the token stays what it was: {error}")


def token_of(file: Path | None, say: Callable[[str], None]) -> Token | None:
    """The token of a file, None where none is named."""
    return None if file is None else Token(file, say)


def check_token(token: Token | None, request: Request) -> None:
    """Raises RequestError (403) where a token is wanted, and the request does not bring it."""
    if token is not None and not token.is_in(request.headers.get("authorization", "")):
        raise RequestError(403, f"{request.url.path} wants the header `Authorization: Bearer TOKEN`")


def read_token(file: Path) -> str:
    """The token that a file holds.

    Raises:
        ConfigError: it is missing, or too short to be secret.
    """
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the token cannot be read: {error}") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{file}: a token is a line of 16 or more plain characters")
    return token


def _state_of(file: Path) -> tuple[int, ...] | None:
    """What differs once the file was written or replaced."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
