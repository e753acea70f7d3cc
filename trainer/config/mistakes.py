"""Messages for values that pydantic refuses, in the words of this project."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

# Names that become names of modules, tensors, columns and files.
NAME = "^[a-z][a-z0-9_]*$"
OWNER = "^(shared|task:[a-z][a-z0-9_]*|domain:[0-9]+)$"
_PATTERNS = {
    NAME: "must be a name: a small letter first, then small letters, digits and _",
    OWNER: 'must be "shared", "task:NAME" or "domain:ID" with the number of an id',
}
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
    "tuple": 'must be a list, such as ["a", "b"] or [1, 2]',
    "list": 'must be a list, such as ["a", "b"] or [1, 2]',
}
_KIND = re.compile(r"^(bool|int|float|string|dict|model|date|tuple|list)(_|$)")
# Names of forms: pydantic puts them into the place of a value that may have several forms.
_FORM = re.compile(r"constrained-\w+|(dict|list|tuple|set|literal)\[.*\]")
# A value of one of these types has another form, whatever its bounds are.
_OTHER_FORM = ("_type", "_parsing", "_from_float", "literal_error")
# What pydantic puts at the end of a place to say that the key is wrong.
_OF_KEY = "[key]"
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
    if kind == "string_pattern_mismatch" and (words := _PATTERNS.get(problem["ctx"]["pattern"])):
        return words
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


def problems_of(model: type[BaseModel], tree: dict[str, Any]) -> list[dict[str, Any]]:
    """What a model refuses of a tree: one problem for each place, as those of `ValidationError.errors`.

    If a value may have several forms, the problems are those of the form that it has, or that it has none.
    """
    try:
        model.model_validate(tree)
    except ValidationError as error:
        return _of_one_form([dict(problem) for problem in error.errors()], 0)
    return []


def _of_one_form(problems: Sequence[dict[str, Any]], start: int) -> list[dict[str, Any]]:
    """The problems without those of other forms than a value has, from part `start` of their places on."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    forms: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for problem in problems:
        place = problem["loc"]
        at = next((n for n in range(start, len(place)) if _FORM.fullmatch(str(place[n]))), None)
        if at is None:
            found.setdefault(place, problem)
            continue
        rest = {**problem, "loc": (*place[:at], *place[at + 1 :])}
        forms.setdefault(place[:at], {}).setdefault(str(place[at]), []).append(rest)
    for place, of_forms in forms.items():
        has = [each for each in of_forms.values() if not _is_other(each, place)]
        if has:
            inner = _of_one_form(has[0], len(place))
        else:
            firsts = [each[0] for each in of_forms.values()]
            words = [words_of(first).removeprefix("must be ") for first in firsts]
            several = ", ".join(words[:-1]) + " or " if words[:-1] else ""
            inner = [{**firsts[0], "type": "no_form", "msg": f"must be {several}{words[-1]}"}]
        for problem in inner:
            found.setdefault(problem["loc"], problem)
    return list(found.values())


def _is_other(problems: Sequence[Mapping[str, Any]], place: tuple[Any, ...]) -> bool:
    """Whether the problems of one form are that the value at a place has another one."""
    return any(each["loc"] == place and each["type"].endswith(_OTHER_FORM) for each in problems)


def explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One of `problems_of` a model, with its key and what to do."""
    location = [str(part) for part in problem["loc"]]
    given, kind = problem.get("input"), problem["type"]
    if location[-1:] == [_OF_KEY]:
        of_key = words_of(problem)
        return f"{'.'.join(location[:-1])}: {'' if of_key == _PATTERNS[NAME] else 'a key '}{of_key}"
    name = ".".join(location)
    if kind == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        elsewhere = _only_place(model, location[-1])
        full = elsewhere or (".".join([*location[:-1], near[0]]) if near else "")
        hint = f"did you mean {full!r}?" if full else f"known here: {', '.join(sorted(known))}"
        return f"unknown key {name!r}; {hint}"
    message = words_of(problem)
    if kind == "dict_type" and _has_named_sections(model, location):
        named = [each for each in (given if isinstance(given, list) else [given]) if isinstance(each, str)]
        example = named[0] if named and re.fullmatch(NAME, named[0]) else "NAME"
        message = f"has a section for each name: write [{name}.{example}]"
    told = not isinstance(given, str | int | float | bool) or message.startswith(f"{given}: ")
    shown = "" if told or not name else f" (given: {given!r})"
    return f"{name}: {message}{shown}" if name else message


def is_key(model: type[BaseModel], location: Sequence[str]) -> bool:
    """Whether a model may have something at a place."""
    return bool(location) and _type_at(model, location) is not None


def _has_named_sections(model: type[BaseModel], location: Sequence[str]) -> bool:
    """Whether the value at a place is a table of sections whose names the user chooses."""
    return _are_named(_type_at(model, location))


def _are_named(annotation: Any) -> bool:
    of_tables = [
        each for each in (annotation, *typing.get_args(annotation)) if typing.get_origin(each) is dict
    ]
    return any(next(models_in(each), None) is not None for each in of_tables)


def _type_at(model: type[BaseModel], location: Sequence[str]) -> Any:
    """The type of what stands at a place, None where nothing can."""
    annotation: Any = model
    for part in location:
        inner = next(models_in(annotation), None)
        if inner is None:
            return None
        if _are_named(annotation):
            annotation = inner
        elif part in inner.model_fields:
            annotation = inner.model_fields[part].annotation
        else:
            return None
    return annotation


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
