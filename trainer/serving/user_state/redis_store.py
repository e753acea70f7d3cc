"""User states in a server of the Redis protocol (Redis, Valkey, KeyDB, Dragonfly)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from embeddings.errors import ConfigError, UnavailableError
from trainer.config.toml import Settings


class RedisSettings(Settings):
    """Several machines share states, through a server that keeps them in its memory."""

    kind: Literal["redis"]
    """A server of the Redis protocol."""
    url: str = "redis://127.0.0.1:6379/0"
    """`redis://HOST:PORT/DATABASE`, `rediss://...` for TLS, or `unix:///path/of/socket`. No password."""
    user: str = ""
    """Of the server; empty: its default user."""
    password_file: Path | None = None
    """A file that holds the password."""
    certificates: Path | None = None
    """A file with the certificates that sign the server's, for TLS; none: those of the system."""
    prefix: str = "tandemrec:user:"
    """What every key begins with."""
    ttl_seconds: int = Field(86_400, ge=1)
    """Seconds after which the server drops a state that was not written again."""
    timeout_ms: int = Field(50, ge=1, le=60_000)
    """Milliseconds that a request waits for the server at most, each time it sends or receives."""

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            secret, scheme, _ = parts.password or parts.username, parts.scheme, parts.port
        except ValueError as error:
            raise ValueError(f"is no address: {error}") from None
        if scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if secret:
            raise ValueError("has credentials in it; give user and password_file instead")
        return url

    def open(self) -> RedisStore:
        """A store that connects when it is first asked.

        Raises:
            ConfigError: the file of the password cannot be read.
        """
        return RedisStore(self)


class RedisStore:
    """See `trainer.serving.user_state.store.StateStore`. A call tries only once."""

    def __init__(self, settings: RedisSettings) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._settings, self._error = settings, redis.RedisError
        seconds = settings.timeout_ms / 1000
        options: dict[str, Any] = {
            "username": settings.user or None,
            "password": _password(settings.password_file),
            "socket_timeout": seconds,
            "retry": Retry(NoBackoff(), 0),
        }
        if not settings.url.startswith("unix"):
            options |= {"socket_connect_timeout": seconds, "socket_keepalive": True}
        if settings.url.startswith("rediss") and settings.certificates is not None:
            options["ssl_ca_certs"] = str(settings.certificates)
        self._client = redis.Redis.from_url(settings.url, **options)

    def get(self, key: bytes) -> bytes | None:
        with self._plain_errors():
            content = self._client.get(self._name(key))
            return content if content is None or isinstance(content, bytes) else bytes(str(content), "utf-8")

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None:
        with self._plain_errors():
            self._client.set(self._name(key), b"".join(parts), ex=self._settings.ttl_seconds)

    def close(self) -> None:
        with suppress(self._error, OSError):
            self._client.close()

    def _name(self, key: bytes) -> str:
        return f"{self._settings.prefix}{key.hex()}"

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (self._error, OSError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UnavailableError(self._settings.url, f"the store of user states fails: {text}") from None


def _password(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"user_states.store.password_file: {file}: cannot be read: {error}") from None
