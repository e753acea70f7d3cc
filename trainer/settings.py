"""Reading a TOML file and `section.key=value` overrides into a frozen pydantic model.

A file may start from another: `extends = "other.toml"`, a path beside it. Its own keys win, table by table.
An unknown key is an error that names the nearest valid one; every message names the file and the key.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from embeddings.errors import ConfigError


class Settings(BaseModel):
    """Base of every config section: immutable, and no key that the code does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


SettingsType = TypeVar("SettingsType", bound=Settings)


def load_settings(
    model: type[SettingsType], path: Path | None, overrides: Sequence[str] = ()
) -> SettingsType:
    """Read `path` (None = start from the defaults), apply the overrides in order, validate.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, a value is wrong.
    """
    tree = {} if path is None else _read(path, ())
    for override in overrides:
        _apply(tree, override)
    return validate_settings(model, tree, str(path or "--set"))


def validate_settings(model: type[SettingsType], tree: dict[str, Any], where: str) -> SettingsType:
    """Validate a tree of plain values; `where` leads every message."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(_explain(model, dict(problem)) for problem in error.errors())
        raise ConfigError(f"{where}: {problems}") from None


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tree over that of the file it extends; `below` are those that extend this one."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        from_ = f", which {below[-1]} extends" if below else "; configs/ holds ready ones"
        raise ConfigError(f"{path}: no such file{from_}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f'{path}: extends must be the path of one file, such as "base/common.toml"')
    chain = (*below, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"{path}: extends {base}, which leads back to itself")
    return _over(tree, _read(path.parent / base, chain))


def _over(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `tree` in their places."""
    merged = dict(base)
    for key, value in tree.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _over(value, below)
        else:
            merged[key] = value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {section!r} is a value, not a section")
        tree = child
    tree[last] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """TOML where it parses, else the bare text: `--set data.log=runs/demo/log` needs no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    if set(parsed) != {"value"}:
        raise ConfigError(f"--set ...={text}: give one value on one line")
    return parsed["value"]


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        full = ".".join([*location[:-1], near[0]]) if near else ""
        hint = f"did you mean {full!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in ("tuple_type", "list_type"):
        message = 'Input should be a list, such as ["a", "b"]'
    given = problem.get("input")
    shown = f" (given: {given!r})" if name and isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}" if name else message


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    current: type[BaseModel] | None = model
    for part in location:
        if current is None:
            return []
        field = current.model_fields.get(part)
        candidates = [] if field is None else list(models_in(field.annotation))
        current = candidates[0] if candidates else (current if field is None else None)
    return [] if current is None else list(current.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models named in a (possibly nested) type annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for part in typing.get_args(annotation):
        yield from models_in(part)
