"""Reads a TOML file and `section.key=value` overrides into a frozen pydantic model.

A file may start from another one: `extends = "other.toml"` names it by its path from the first one. The keys
of the first file win, table by table. An unknown key is an error that names the nearest valid key. Every
message names the file, or the override, and the key.
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
    """Base of every config section: it is immutable, and an unknown key is an error.

    A docstring under each field says what the key means. `docs/tools/config_page.py` reads these docstrings
    from the source. pydantic could keep them (`use_attribute_docstrings`), but then importing the sections
    takes twice as long in every process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


# Names of forms: pydantic puts them into the place of a value that may have several forms.
_FORM = re.compile(r"constrained-\w+|(dict|list|tuple|set)\[.*\]")
SettingsType = TypeVar("SettingsType", bound=Settings)
# Verb -> the keys that only its config has, and what the user should give instead.
_VERBS: dict[str, tuple[set[str], str]] = {
    "train": (
        {"data", "model", "groups", "tables", "tasks", "train", "comms", "checkpoint", "plan"},
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
    """Read the file, or start from the defaults without one; apply the overrides in order, and validate.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, or a value is wrong.
    """
    tree = {} if path is None else _read(path, ())
    wanted = next((verb for verb, (keys, _) in _VERBS.items() if keys.issubset(model.model_fields)), "")
    for verb, (keys, _) in _VERBS.items():
        # The file holds nothing but keys of another verb's config.
        if wanted and tree and keys.issuperset(tree) and not set(tree).intersection(model.model_fields):
            mistake = f"this is a config of `{verb}`; `{wanted}` wants {_VERBS[wanted][1]}"
            raise ConfigError(f"{path}: {mistake}")
    whole = copy.deepcopy(tree)
    for override in overrides:
        _apply(whole, override)
    problems = _problems(model, whole)
    if not problems:
        return model.model_validate(whole)
    sources = [_override_of(problem["loc"], overrides) or str(path or "--set") for problem in problems]
    if path is not None and overrides:
        of_file = [(problem["loc"], problem["msg"]) for problem in _problems(model, tree)]
        for i, problem in enumerate(problems):
            if (problem["loc"], problem["msg"]) in of_file:
                sources[i] = str(path)
    # All problems in one line, behind the file or the overrides that have them. The keys of a section are
    # listed once, even where several unknown keys are in it.
    lines: dict[str, list[str]] = {}
    listed = set[str]()
    for problem, source in zip(problems, sources, strict=True):
        line = _explain(model, problem)
        short, _, known = line.partition("; known here: ")
        lines.setdefault(source, []).append(short if known in listed else line)
        listed |= {known} - {""}
    raise ConfigError("; ".join(f"{source}: {'; '.join(texts)}" for source, texts in lines.items()))


def _override_of(location: Sequence[Any], overrides: Sequence[str]) -> str:
    """The last override that set something at this place, or all overrides if none of them did."""
    place = [str(part) for part in location]
    at_place = []
    for override in overrides:
        key = override.partition("=")[0].strip().split(".")
        # One of the two is the other, or a section around it.
        if place and all(a == b for a, b in zip(key, place, strict=False)):
            at_place.append(override)
    return " ".join(f"--set {each}" for each in (at_place[-1:] or overrides))


def _problems(model: type[Settings], tree: dict[str, Any]) -> list[dict[str, Any]]:
    """One problem for each place. If a value may have several forms, it is that of the nearest form."""
    problems: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        model.model_validate(tree)
    except ValidationError as error:
        for raw in error.errors():
            place = tuple(part for part in raw["loc"] if not _FORM.fullmatch(str(part)))
            other = problems.get(place)
            if other is None or other["type"].endswith("_type") > raw["type"].endswith("_type"):
                problems[place] = {**raw, "loc": place}
    return list(problems.values())


def _read(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """The file's tree over that of the file it extends; `extending` are the files that extend this one."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = f", which {extending[-1]} extends" if extending else "; configs/ holds ready ones"
        raise ConfigError(f"{path}: no such file{advice}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f'{path}: extends must be the path of one file, such as "base/common.toml"')
    chain = (*extending, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(f"{path}: extends {base}, which leads back to itself")
    return _over(tree, _read(path.parent / base, chain))


def _over(tree: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`base`, with the values of `tree` in their places."""
    merged = dict(base)
    for key, value in tree.items():
        other = merged.get(key)
        merged[key] = _over(value, other) if isinstance(value, dict) and isinstance(other, dict) else value
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
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        # A text needs no quotes: `data.log=runs/demo/log`.
        parsed = {"value": text}
    if set(parsed) != {"value"}:
        raise ConfigError(f"--set ...={text}: give one value on one line")
    tree[last] = parsed["value"]


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
    """The full name of a key of another section, or "" if no section or several of one depth have it.

    Sections with names of the user's choice, such as groups, do not count.
    """
    level: list[tuple[str, type[BaseModel]]] = [("", model)]
    while level:
        names = [f"{path}{key}" for path, section in level if key in section.model_fields]
        if names:
            return names[0] if len(names) == 1 else ""
        level = [
            (f"{path}{name}.", field.annotation)
            for path, section in level
            for name, field in section.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ]
    return ""


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys of the section at a place. What is no key on the way is a name that the user chose."""
    for part in location:
        if field := model.model_fields.get(part):
            inner = next(models_in(field.annotation), None)
            if inner is None:
                return []
            model = inner
    return list(model.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models named in a (possibly nested) type annotation."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for part in typing.get_args(annotation):
        yield from models_in(part)
