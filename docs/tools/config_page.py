"""Writes docs/config.md: every key of all configurations, with its default, its values and its meaning.

The meaning of a key is the docstring under its field. `make docs` runs this before it builds the site.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.tools.links import escaped
from pipelines.ingest.config import IngestConfig
from pipelines.serve.settings import ServeSettings
from pipelines.tune.settings import SpaceConfig
from trainer.config.mistakes import models_in
from trainer.config.toml import Settings
from trainer.objectives.table import OBJECTIVES, RANKINGS
from trainer.run_config import Config

_HEAD = """# Configuration: every key

`make docs` writes this page from the settings models. Each key can be set in a TOML file, or by
`--set section.key=value`. A file may start from another file: `extends = "other.toml"` names it by its path
from the first one. The values of the first file win. An unknown key is an error. configs/ holds ready files.
Other pages explain what the keys do: [training.md](training.md), [models.md](models.md),
[tables.md](tables.md), [checkpoints.md](checkpoints.md), [plan.md](plan.md), [ingest.md](ingest.md),
[serving.md](serving.md), [tuning.md](tuning.md).

After `tandemrec --install-completion` the shell completes verbs and options.
"""
PAGE = Path(__file__).resolve().parents[1] / "config.md"
_MODELS: tuple[tuple[str, str, type[Settings]], ...] = (
    ("Training", "For `tandemrec train`, `plan` and `bench`.", Config),
    ("Ingest", "For `tandemrec ingest`.", IngestConfig),
    ("Serve", "For `tandemrec serve --config`.", ServeSettings),
    ("Tune", "For `tandemrec tune --space`.", SpaceConfig),
)
# Keys of text whose values are the names of a table, and whose meanings the docstrings there.
_TABLES: dict[str, Mapping[str, Any]] = {
    "train.objective": OBJECTIVES,
    "tasks.<name>.loss": OBJECTIVES,
    "tasks.<name>.rank": RANKINGS,
}
# Values besides, which the text under the field explains.
_BESIDE = {"tasks.<name>.loss": ("", "none"), "tasks.<name>.rank": ("none",)}
_WORDS = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}


def document() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, what, model in _MODELS:
        parts += [f"\n## {title}\n\n{what}\n", *_sections("", "", model, set())]
    return "".join(parts)


def texts_of(model: type[Settings]) -> dict[str, str]:
    """Key -> the docstring that stands under it in its class, or in one that its class is made from.

    They are read from the source here: pydantic's `use_attribute_docstrings` does the same, but in every
    process that imports the settings, which then takes twice as long.
    """
    texts: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, Settings) and kind is not Settings:
            texts |= _docstrings(kind)
    return texts


def _docstrings(kind: type[Settings]) -> dict[str, str]:
    """Name -> docstring, in one line, of each annotated name in the body of a class."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in pairwise(body.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(docstring))),
            ):
                texts[name] = " ".join(docstring.split())
    return texts


def _sections(path: str, heading: str, model: type[Settings], told: set[type[BaseModel]]) -> Iterator[str]:
    """The tables of a model and of all below it; of several kinds that a key may be, each once (`told`)."""
    texts, schema, rows, below = texts_of(model), model.model_json_schema(), [], []
    for key, field in model.model_fields.items():
        kinds = list(models_in(field.annotation))
        inner = next(iter(kinds), None)
        if len(kinds) > 1:
            below += [(f"{key} = {_kind(kind)}", kind) for kind in kinds if kind not in told]
            told.update(kinds)
        elif inner is not None and issubclass(inner, Settings):
            below.append((_place(path, key, field), inner))
            if not path:
                continue
        default, values = _default(field), _values(schema["properties"][key])
        meaning = texts.get(key) or (_summary(inner) if inner is not None else "")
        if table := _TABLES.get(f"{path}.{key}"):
            values = ", ".join(f'`"{name}"`' for name in (*_BESIDE.get(f"{path}.{key}", ()), *table))
            meaning = " ".join([meaning, *(f"`{name}`: {_first_line(kind)}" for name, kind in table.items())])
        rows.append(f"| `{key}` | {default} | {values} | {_cell(meaning)} |")
    if heading:
        yield f"\n### {heading}\n\n{escaped(inspect.cleandoc(model.__doc__ or ''))}\n"
    if rows:
        yield "\n| key | default | values | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for place, inner in below:
        if issubclass(model, inner):
            # Branches of [model] have the keys of its own first part.
            continue
        bare = place.strip("[]")
        titled = place if " = " in place else f"[[{bare}]]" if place.startswith("[[") else f"[{bare}]"
        yield from _sections(bare, f"`{titled}`", inner, told)


def _kind(model: type[BaseModel]) -> str:
    """How a value of one of several kinds begins."""
    (kind,) = get_args(model.model_fields["kind"].annotation)
    return f'{{ kind = "{kind}", ... }}'


def _place(path: str, key: str, field: FieldInfo) -> str:
    """Where a section stands: `data.search`, `groups.<name>`, `[[features]]`."""
    whole = f"{path}.{key}" if path else key
    kind = get_origin(field.annotation)
    if kind is dict:
        return f"{whole}.<name>"
    return f"[[{whole}]]" if kind is tuple else whole


def _summary(model: type[BaseModel]) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].split())


def _first_line(kind: object) -> str:
    """The first line of the docstring of a function, or of what a `partial` or an entry of a table calls."""
    for name in ("func", "losses", "values"):
        kind = getattr(kind, name, kind)
    return (inspect.getdoc(kind) or "").partition("\n")[0]


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
    if "prefixItems" in entry:
        return f"list of {len(entry['prefixItems'])}: {_values(entry['prefixItems'][0])}"
    if entry.get("type") == "array":
        return f"list of {_values(entry['items'])}"
    if entry.get("type") == "object":
        return _table(entry)
    return _WORDS.get(entry.get("type", ""), "see below" if entry else "anything") + _bounds(entry)


def _table(entry: Mapping[str, Any]) -> str:
    if entry.get("additionalProperties") is True:
        return "table of anything"
    named: list[Mapping[str, Any]] = list(entry.get("patternProperties", {}).values())
    return f"table, each {_values(named[0] if named else entry['additionalProperties'])}"


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
    return escaped(text).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
