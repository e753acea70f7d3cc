"""Reads a TOML file and `section.key=value` overrides into a frozen pydantic model.

A file may start from another one: `extends = "other.toml"` names it by its path from the first one. The keys
of the first file win, table by table. An unknown key is an error that names the nearest valid key. Every
message names the file, or the override, and the key.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from embeddings.errors import ConfigError
from trainer.config.mistakes import explain, is_key, problems_of
from trainer.storage import is_remote, place, refuse_secrets
from trainer.storage.addresses import address_of


class Settings(BaseModel):
    """Base of every config section: it is immutable, and an unknown key is an error.

    A docstring under each field says what the key means. `docs/tools/config_page.py` reads these docstrings
    from the source. pydantic could keep them (`use_attribute_docstrings`), but then importing the sections
    takes twice as long in every process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


# The beginning of what tomllib says of a file -> the same with what to do.
_TOML_WORDS = (
    ("Invalid initial character for a key part", "a key with such a character, or a star, must be in quotes"),
    ("Cannot overwrite a value", "this key is given twice"),
    ("Cannot declare ", "this section is given twice, or is a value elsewhere"),
    (
        "Cannot mutate immutable namespace",
        "what is written in { } gets no further keys; put them between these",
    ),
)
# The key that a message begins with.
_KEY = re.compile(r"[a-z]\w*(\.[\w-]+)*(?=[: ])")
SettingsType = TypeVar("SettingsType", bound=Settings)
# Verb -> the keys that only its config has, and what the user should give instead.
_VERBS: dict[str, tuple[set[str], str]] = {
    "train": (
        {"data", "model", "groups", "tables", "tasks", "train", "phases"} | {"comms", "checkpoint", "plan"},
        "one with [data], [model] and [train], such as configs/dare.toml",
    ),
    "ingest": (
        {"protocol", "task", "seed", "users", "events", "features", "context", "impressions", "item_table"}
        | {"user_table", "domains", "text_columns", "partition_columns", "csv", "requests", "split"}
        | {"vocabulary", "files", "engine"},
        "one with protocol, [events] and [split], such as configs/ingest_time_split.toml",
    ),
    "serve": (
        {"http", "grpc", "inference", "limits", "batching", "user_states", "hot_rows", "updates", "access"}
        | {"logs", "traces", "drain"},
        "one with sections such as [http] and [limits]; every key has a default, see docs/config.md",
    ),
    "tune --space": (
        {"study", "trial", "parameters"},
        "one with [parameters], such as configs/spaces/rates.toml",
    ),
}


@dataclass(frozen=True)
class Sources:
    """Where the settings of a config come from, for messages.

    Attributes:
        files: the file and those that it extends, nearest first, each with its own keys.
        overrides: `section.key=value`, in their order.
    """

    files: tuple[tuple[Path, Mapping[str, Any]], ...] = ()
    overrides: tuple[str, ...] = ()

    @staticmethod
    def read(path: Path | None, overrides: Sequence[str] = ()) -> Sources:
        """Raises:
        ConfigError: a file is missing or no TOML, or credentials are in an address.
        """
        for override in overrides:
            with _beginning("--set"):
                refuse_secrets(override)
        files = () if path is None else tuple(_read(path, ()))
        for file, own in files:
            _refuse_secrets(file, own, ())
        return Sources(files, tuple(overrides))

    def tree(self, overrides: Sequence[str] | None = None) -> dict[str, Any]:
        """The settings as one tree; `overrides`: others than all of them.

        Raises:
            ConfigError: an override is none.
        """
        tree: dict[str, Any] = {}
        for _, own in reversed(self.files):
            tree = _over(own, tree)
        tree = copy.deepcopy(tree)
        for override in self.overrides if overrides is None else overrides:
            _apply(tree, override)
        return tree

    def place_of(self, location: Sequence[Any]) -> str:
        """The override, or else the file, that set what is at a place; the first file if none did."""
        if at_place := self.override_at(location):
            return at_place
        return self.file_of(location)

    def override_at(self, location: Sequence[Any], *, inside: bool = True) -> str:
        """The last override that set what is at a place, or around it, or something in it; empty if none did.

        Args:
            inside: whether those count that set something in it.
        """
        place = [str(part) for part in location]
        for override in reversed(self.overrides):
            key = override.partition("=")[0].strip().split(".")
            same = all(a == b for a, b in zip(key, place, strict=False))
            if place and same and (inside or len(key) <= len(place)):
                return f"--set {override}"
        return ""

    def file_of(self, location: Sequence[Any]) -> str:
        """The file that set what is at a place, the first one if several or none have a part in it."""
        holding = [path for path, own in self.files if _holds(own, location)]
        if not holding:
            return str(self.files[0][0]) if self.files else "--set"
        first = self.files[0][0]
        whole = len(holding) == 1 or not _is_section(dict(self.files)[holding[0]], location)
        found = holding[0] if whole else first
        return str(first) if found == first else f"{found} (which {first} extends)"


def load_settings(
    model: type[SettingsType], path: Path | None, overrides: Sequence[str] = ()
) -> SettingsType:
    """Read the file, or start from the defaults without one; apply the overrides in order, and validate.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, or a value is wrong.
    """
    sources = Sources.read(path, overrides)
    tree = sources.tree(())
    wanted = next((verb for verb, (keys, _) in _VERBS.items() if keys.issubset(model.model_fields)), "")
    for verb, (keys, _) in _VERBS.items():
        # The file holds nothing but keys of another verb's config.
        if wanted and tree and keys.issuperset(tree) and not set(tree).intersection(model.model_fields):
            mistake = f"this is a config of `{verb}`; `{wanted}` wants {_VERBS[wanted][1]}"
            raise ConfigError(f"{path}: {mistake}")
    whole = sources.tree()
    problems = problems_of(model, whole)
    if not problems:
        return model.model_validate(whole)
    # All problems in one line, behind the file or the overrides that have them. The keys of a section are
    # listed once, even where several unknown keys are in it.
    lines: dict[str, list[str]] = {}
    listed = set[str]()
    for problem in problems:
        line = explain(model, problem)
        short, _, known = line.partition("; known here: ")
        source = _source_of(problem, model, sources)
        lines.setdefault(source, []).append(short if known in listed else line)
        listed |= {known} - {""}
    raise ConfigError("; ".join(f"{source}: {'; '.join(texts)}" for source, texts in lines.items()))


@contextmanager
def naming(sources: Sources, model: type[BaseModel]) -> Iterator[None]:
    """Have errors about a key of the config name the file or the override that set it.

    They come from where the settings are held against a log: what `load_settings` refuses has its place.
    """
    try:
        yield
    except ConfigError as error:
        begins = _KEY.match(str(error))
        key = begins[0].split(".") if begins else []
        if type(error) is not ConfigError or not sources.files or not is_key(model, key):
            raise
        raise ConfigError(f"{sources.place_of(key)}: {error}") from error.__cause__


def flat_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a config as (`section.key`, value).

    Entries of an array of tables, such as `phases`, are sections by their number.
    """
    for key, value in tree.items():
        entries = isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value)
        section = {str(place): entry for place, entry in enumerate(value)} if entries else value
        if isinstance(section, Mapping):
            yield from flat_settings(section, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _source_of(problem: Mapping[str, Any], model: type[Settings], sources: Sources) -> str:
    """The file that has a problem without any override, or the overrides without which there is none."""
    location, overrides = problem["loc"], sources.overrides
    if at_place := sources.override_at(location, inside=False):
        return at_place

    def there(others: Sequence[str]) -> bool:
        # The sections that these others need may be missing, which is another problem.
        with suppress(ConfigError):
            found = problems_of(model, sources.tree(others))
            return any((each["loc"], each["msg"]) == (location, problem["msg"]) for each in found)
        return False

    if sources.files and (not overrides or there(())):
        return sources.file_of(location)
    needed = [
        place for place in range(len(overrides)) if not there(overrides[:place] + overrides[place + 1 :])
    ]
    if needed:
        return " ".join(f"--set {overrides[place]}" for place in needed)
    # Several set it alike, so that none alone is to blame.
    return " ".join(f"--set {override}" for override in overrides) or "--set"


def _holds(tree: Mapping[str, Any], location: Sequence[Any]) -> bool:
    value: Any = tree
    for part in location:
        # A list or a value of this file is all that there is of it.
        if not isinstance(value, Mapping):
            return True
        if part not in value:
            return False
        value = value[part]
    return bool(location)


def _is_section(tree: Mapping[str, Any], location: Sequence[Any]) -> bool:
    value: Any = tree
    for part in location:
        value = value.get(part) if isinstance(value, Mapping) else None
    return isinstance(value, Mapping)


def _read(path: Path, extending: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The file's tree and those of the files that it extends; `extending`: the files that extend this one."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        advice = f", which {extending[-1]} extends" if extending else "; configs/ holds ready ones"
        raise ConfigError(f"{path}: no such file{advice}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {_toml_words(str(error))}") from None
    base = tree.pop("extends", None)
    yield path, tree
    if base is None:
        return
    if not isinstance(base, str):
        raise ConfigError(f'{path}: extends must be the path of one file, such as "base/common.toml"')
    chain = (*extending, path.resolve())
    with _beginning(f"{path}: extends:"):
        # A file in a store may start from a local one, and the other way round.
        own = address_of(base) is not None or Path(base).is_absolute()
        start = place(base) if own else path.parent / base
    if start.resolve() in chain:
        raise ConfigError(f"{path}: extends {base}, which leads back to itself")
    yield from _read(start.resolve() if is_remote(start) else start, chain)


def _toml_words(message: str) -> str:
    """What tomllib says, with what to do where its own words leave that open."""
    for words, advice in _TOML_WORDS:
        if message.startswith(words):
            return f"{advice}{message[message.rfind(' (at ') :]}"
    return message


@contextmanager
def _beginning(where: str) -> Iterator[None]:
    """Have an error of an address begin with where the address stands."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None


def _refuse_secrets(file: Path, value: Any, location: tuple[str, ...]) -> None:
    """Raises ConfigError where a text of a file has an address with credentials: a run would keep them."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_secrets(file, inner, (*location, key))
    elif isinstance(value, list):
        for inner in value:
            _refuse_secrets(file, inner, location)
    elif isinstance(value, str):
        with _beginning(f"{file}: {'.'.join(location)}:"):
            refuse_secrets(value)


def _over(tree: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
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
    within: Any = tree
    for section in sections:
        if isinstance(within, list):
            child = _entry(within, section, override)
        else:
            child = within.setdefault(section, {})
        if not isinstance(child, dict | list):
            raise ConfigError(f"--set {override}: {section!r} is a value, not a section")
        within = child
    if isinstance(within, list):
        raise ConfigError(
            f"--set {override}: {sections[-1]!r} is a list; give all of it, or a key of an entry"
        )
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        # A text needs no quotes: `data.log=runs/demo/log`.
        parsed = {"value": text}
    if set(parsed) != {"value"}:
        raise ConfigError(f"--set ...={text}: give one value on one line")
    within[last] = parsed["value"]


def _entry(entries: list[Any], number: str, override: str) -> Any:
    """An entry of an array of tables, `phases.0`."""
    if not number.isdigit() or int(number) >= len(entries):
        known = f"0 to {len(entries) - 1}" if entries else "none, for the list is empty"
        raise ConfigError(f"--set {override}: {number!r} is no entry of the list; its entries are {known}")
    return entries[int(number)]
