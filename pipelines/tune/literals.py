"""Values as TOML on one line, for overrides and for files that hold one key a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w


def literal(value: Any) -> str:
    """The value as TOML, on one line whatever is in it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {literal(each)}" for key, each in value.items()) + " }"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(literal, value)) + "]"
    return tomli_w.dumps({"value": value}).partition("=")[2].strip()


def dotted(parts: Sequence[str]) -> str:
    """A dotted key."""
    return ".".join(map(_key, parts))


def _key(part: str) -> str:
    return tomli_w.dumps({part: 0}).rpartition(" = ")[0]
