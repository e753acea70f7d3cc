"""Reading a TOML file and `section.key=value` overrides into a frozen pydantic model.

A file may start from another: `extends = "other.toml"`, a path beside it. Its own keys win, table by table.
An unknown key is an error that names the nearest valid one; every message names the file and the key.
"""

from __future__ import annotations

import copy
import difflib
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from embeddings.errors import ConfigError
from trainer.config.mistakes import words_of


class Settings(BaseModel):
    """Base of every config section: immutable, and no key that the code does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# What pydantic adds to the place of a value that may have one of several forms.
_FORM = re.compile(r"constrained-\w+|(dict|list|tuple|set)\[.*\]")
SettingsType = TypeVar("SettingsType", bound=Settings)
# Verb -> sections that its config alone has, and what to ask for.
_VERBS: dict[str, tuple[set[str], str]] = {
    "train": (
        {"data", "model", "groups", "tables", "train", "comms", "checkpoint", "plan"},
        "one with [data], [model] and [train], such as configs/dare.toml",
    ),
    "ingest": (
        {"protocol", "task", "seed", "users", "events", "features", "context", "impressions", "item_table"}
        | {"user_table", "domains", "text_columns", "partition_columns", "csv", "requests", "split"}
        | {"vocabulary", "files", "engine"},
        "one with protocol, [events] and [split], such as configs/ingest_time_split.toml",
    ),
}


def load_settings(
    model: type[SettingsType], path: Path | None, overrides: Sequence[str] = ()
) -> SettingsType:
    """Read `path` (None = start from the defaults), apply the overrides in order, validate.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, a value is wrong.
    """
    tree = {} if path is None else _read(path, ())
    if path is not None:
        _check_verb(model, tree, path)
    whole = copy.deepcopy(tree)
    for override in overrides:
        _apply(whole, override)
    try:
        return model.model_validate(whole)
    except ValidationError as error:
        raise ConfigError(_blamed(model, error, tree, str(path or ""), overrides)) from None


def validate_settings(model: type[SettingsType], tree: dict[str, Any], where: str) -> SettingsType:
    """Validate a tree of plain values; `where` leads every message."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explained(model, _problems(error), set())}") from None


def _check_verb(model: type[Settings], tree: dict[str, Any], path: Path) -> None:
    """Raises where a file holds nothing but sections of another verb's config."""
    for verb, (keys, _) in _VERBS.items():
        if tree and keys.issuperset(tree) and not set(tree).intersection(model.model_fields):
            mine = next((name for name, (own, _) in _VERBS.items() if own.issubset(model.model_fields)), "")
            if mine:
                problem = f"this is a config of `{verb}`; `{mine}` wants {_VERBS[mine][1]}"
                raise ConfigError(f"{path}: {problem}")


def _blamed(
    model: type[Settings],
    error: ValidationError,
    tree: dict[str, Any],
    path: str,
    overrides: Sequence[str],
) -> str:
    """The problems, each behind the file that has it, or behind the overrides without which it is none."""
    try:
        model.model_validate(tree)
        old: list[dict[str, Any]] = []
    except ValidationError as alone:
        old = _problems(alone) if path else []
    known = [(problem["loc"], problem["msg"]) for problem in old]
    told: dict[str, list[dict[str, Any]]] = {}
    for problem in _problems(error):
        mine = path if (problem["loc"], problem["msg"]) in known else _culprit(problem["loc"], overrides)
        told.setdefault(mine or path or "--set", []).append(problem)
    lists = set[str]()
    return "; ".join(f"{where}: {_explained(model, problems, lists)}" for where, problems in told.items())


def _culprit(location: Sequence[Any], overrides: Sequence[str]) -> str:
    """The override of a place, or all of them where none is of it alone."""
    place = [str(part) for part in location]
    of = [one for one in overrides if _meets(one.partition("=")[0].strip().split("."), place)]
    return " ".join(f"--set {one}" for one in (of[-1:] or overrides))


def _meets(key: Sequence[str], place: Sequence[str]) -> bool:
    shorter = min(len(key), len(place))
    return bool(place) and list(key[:shorter]) == list(place[:shorter])


def _problems(error: ValidationError) -> list[dict[str, Any]]:
    """One for each place: of the forms that a value may have, the one that it comes nearest to."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for raw in error.errors():
        place = tuple(part for part in raw["loc"] if not _FORM.fullmatch(str(part)))
        if place not in found or (found[place]["type"].endswith("_type") > raw["type"].endswith("_type")):
            found[place] = {**raw, "loc": place}
    return list(found.values())


def _explained(model: type[BaseModel], problems: Sequence[dict[str, Any]], told: set[str]) -> str:
    """All problems in one line; a list of the keys that are known is told once, and kept in `told`."""
    lines = []
    for problem in problems:
        line = _explain(model, problem)
        first, sign, known = line.partition("; known here: ")
        lines.append(first if known in told else line)
        told |= {known} if sign else set()
    return "; ".join(lines)


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
        elsewhere = _only_place(model, location[-1])
        full = elsewhere or (".".join([*location[:-1], near[0]]) if near else "")
        hint = f"did you mean {full!r}?" if full else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}"
    message = words_of(problem)
    given = problem.get("input")
    shown = f" (given: {given!r})" if name and isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}" if name else message


def _only_place(model: type[BaseModel], key: str) -> str:
    """The full name of a key of another section; empty where several sections of one depth have it, or none.

    Sections with free names, such as groups, are not looked into.
    """
    level: list[tuple[str, type[BaseModel]]] = [("", model)]
    while level:
        found = [f"{path}{key}" for path, section in level if key in section.model_fields]
        if found:
            return found[0] if len(found) == 1 else ""
        level = [
            (f"{path}{name}.", field.annotation)
            for path, section in level
            for name, field in section.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ]
    return ""


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
