"""`make docs`: docs/config.md, every key of both configurations with its default, from the settings models.

A key's line comes from its class: the docstring's `Attributes:` say what a key is.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from pipelines.ingest.config import IngestConfig
from trainer.config.run_config import Config
from trainer.config.toml import Settings, models_in

_HEAD = """# Configuration: every key

Made by `make docs` from the settings models. Each key can be set in a TOML file, or by
`--set section.key=value`. A file may start from another one: `extends = "other.toml"`, a path beside it, over
whose values its own win. Unknown keys are errors. configs/ holds ready files, and other pages explain what
keys do: [training.md](training.md), [models.md](models.md), [tables.md](tables.md),
[checkpoints.md](checkpoints.md), [plan.md](plan.md), [ingest.md](ingest.md).

`tandemrec --install-completion` has the shell complete verbs and options.
"""
_FILES: tuple[tuple[str, str, type[Settings]], ...] = (
    ("Training", "For `tandemrec train`, `plan` and `bench`.", Config),
    ("Ingest", "For `tandemrec ingest`.", IngestConfig),
)
# `name:` or `name, other:` at the start of a line, or behind a semicolon.
_NAMES = re.compile(r"(?:^|; )(\w+(?:, \w+)*): ")

_WORDS = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}


def document() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, what, model in _FILES:
        parts += [f"\n## {title}\n\n{what}\n", *_sections("", "", model)]
    return "".join(parts)


def lines_of(model: type[Settings]) -> dict[str, str]:
    """Key -> its line, from the `Attributes:` of the class and of those it is made from."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, Settings) and kind.__doc__:
            _, _, block = inspect.cleandoc(kind.__doc__).partition("\nAttributes:\n")
            for entry in _entries(block):
                found |= _named(entry, model.model_fields)
    described = {name: field.description for name, field in model.model_fields.items() if field.description}
    return found | {name: " ".join(text.split()).rstrip(".") for name, text in described.items()}


def _entries(block: str) -> Iterator[str]:
    """The entries of an `Attributes:` block, each on one line."""
    entry = ""
    for line in block.splitlines():
        if entry and not line.startswith("     "):
            yield entry
            entry = ""
        if line and not line.startswith("    "):
            return
        entry = f"{entry} {line.strip()}".strip()
    if entry:
        yield entry


def _named(entry: str, fields: Mapping[str, FieldInfo]) -> dict[str, str]:
    """`a, b: text; c: more` as a line for each of the three; what names no field belongs to the text."""
    starts = [m for m in _NAMES.finditer(entry) if all(name in fields for name in m[1].split(", "))]
    ends = [match.start() for match in starts[1:]] + [len(entry)]
    return {
        name: entry[match.end() : end].rstrip(".")
        for match, end in zip(starts, ends, strict=True)
        for name in match[1].split(", ")
    }


def _sections(path: str, heading: str, model: type[Settings]) -> Iterator[str]:
    """The tables of a model and of all below it."""
    lines, schema, rows, below = lines_of(model), model.model_json_schema(), [], []
    for key, field in model.model_fields.items():
        inner = next(models_in(field.annotation), None)
        if inner is not None and issubclass(inner, Settings):
            below.append((_place(path, key, field), inner))
            if not path:
                continue
        default, values = _default(field), _values(schema["properties"][key])
        rows.append(f"| `{key}` | {default} | {values} | {_cell(lines.get(key, ''))} |")
    if heading:
        yield f"\n### {heading}\n\n{_about(model)}\n"
    if rows:
        yield "\n| key | default | values | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for place, inner in below:
        if issubclass(model, inner):
            # Branches of [model] have the keys of its own first part.
            continue
        bare = place.strip("[]")
        yield from _sections(bare, f"`[[{bare}]]`" if place.startswith("[[") else f"`[{bare}]`", inner)


def _place(path: str, key: str, field: FieldInfo) -> str:
    """Where a section stands: `data.search`, `groups.<name>`, `[[features]]`."""
    whole = f"{path}.{key}" if path else key
    kind = get_origin(field.annotation)
    if kind is dict:
        return f"{whole}.<name>"
    return f"[[{whole}]]" if kind is tuple else whole


def _about(model: type[Settings]) -> str:
    """What a class says before its `Attributes:`."""
    text, _, _ = inspect.cleandoc(model.__doc__ or "").partition("\nAttributes:\n")
    return text.strip()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "not set"
    if isinstance(value, Settings):
        return "below"
    return f"`{json.dumps(value, default=_plain)}`"


def _plain(value: object) -> object:
    return value.model_dump(exclude_unset=True) if isinstance(value, Settings) else str(value)


def _values(entry: Mapping[str, Any]) -> str:
    """What a key may be, from its JSON schema."""
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{json.dumps(value)}`" for value in entry.get("enum", [entry.get("const")]))
    if "anyOf" in entry:
        kinds = [_values(each) for each in entry["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if entry.get("type") == "array":
        return f"list of {_values(entry['items'])}"
    if entry.get("type") == "object":
        named: list[Mapping[str, Any]] = list(entry.get("patternProperties", {}).values())
        return f"table, each {_values(named[0] if named else entry['additionalProperties'])}"
    return _WORDS.get(entry.get("type", ""), "see below") + _bounds(entry)


def _bounds(entry: Mapping[str, Any]) -> str:
    limits = (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
        ("multipleOf", "in steps of"),
    )
    return "".join(f" {word} {entry[key]:,}" for key, word in limits if key in entry)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
