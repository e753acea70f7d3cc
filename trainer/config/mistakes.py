"""Messages for values that pydantic refuses, in the words of this project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = {
    "missing": "missing, and it is needed",
    "extra_forbidden": "not known here",
    "bool": "must be true or false",
    "int": "must be a whole number",
    "float": "must be a number",
    "string": "must be text",
    "dict": 'must be a table of keys, such as { key = "value" }',
    "model": "must be a section, a table of keys",
    "date": "must be a day such as 2025-03-16",
    "tuple": 'must be a list, such as ["a", "b"]',
    "list": 'must be a list, such as ["a", "b"]',
}
_KIND = re.compile(r"^(bool|int|float|string|dict|model|date|tuple|list)(_|$)")
# For these types the words of pydantic hold the bound, which ours do not.
_BOUND = ("too_short", "too_long", "pattern_mismatch")
_PLAIN = (
    (r"^Value error, ", ""),
    (r"^(Input|String) should be ", "must be "),
    (r"^String should match pattern ", "must match the pattern "),
    (r"^\w+ should have (.*?)(?: after validation)?(, not \d+)?$", r"must have \1\2"),
)


def words_of(problem: Mapping[str, Any], *, json: bool = False) -> str:
    """The message of one of a ValidationError's `errors()`.

    Args:
        problem: the entry of `errors()`.
        json: whether the value comes from JSON. Its objects and lists are written in another way than TOML's.
    """
    kind = str(problem["type"])
    match = _KIND.match(kind)
    name = kind if kind in _WORDS else match[1] if match and not kind.endswith(_BOUND) else ""
    if json and name in ("dict", "model", "tuple", "list"):
        return "must be an object" if name in ("dict", "model") else "must be a list"
    if name:
        return _WORDS[name]
    message = str(problem["msg"])
    for pattern, words in _PLAIN:
        message = re.sub(pattern, words, message)
    return message


def path_in(tree: Any, location: Sequence[int | str]) -> str:
    """A place in a tree, such as `requests[0].candidates`, without the names of types that pydantic puts in.

    The last part may be a key that the tree does not have, because it is missing.
    """
    path = ""
    for place, part in enumerate(location):
        if isinstance(part, int) and isinstance(tree, list) and part < len(tree):
            path, tree = f"{path}[{part}]", tree[part]
        elif isinstance(tree, dict) and part in tree:
            path, tree = f"{path}.{part}", tree[part]
        elif isinstance(tree, dict) and place == len(location) - 1:
            path = f"{path}.{part}"
    return path.removeprefix(".")


def with_unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads`; ValueError where it has a key twice."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"the key {key[:80]!r} occurs twice in an object")
        tree[key] = value
    return tree
