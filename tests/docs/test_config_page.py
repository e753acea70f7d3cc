"""docs/config.md says every key, its default and what it is, as the settings models do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest
from pydantic import Field

from docs.tools.config_page import PAGE, document, texts_of
from docs.tools.links import escaped
from pipelines.ingest.config import IngestConfig
from trainer.config.mistakes import models_in
from trainer.config.toml import Settings
from trainer.objectives.losses import Objective
from trainer.objectives.table import OBJECTIVES
from trainer.run_config import Config


def _models(model: type[Settings], seen: set[type[Settings]]) -> Iterator[type[Settings]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            assert issubclass(inner, Settings)
            yield from _models(inner, seen)


MODELS = [*_models(Config, set()), *_models(IngestConfig, set())]


def test_the_page_is_what_the_models_say() -> None:
    mend = "docs/config.md is stale: run `python -m docs.tools.config_page`, or `make docs`"
    assert PAGE.read_text(encoding="utf-8") == document(), mend


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_has_a_text(model: type[Settings]) -> None:
    """The docstring of a section's class says what a key is that is a section of its own."""
    texts = texts_of(model)
    sections = {key for key, field in model.model_fields.items() if any(models_in(field.annotation))}
    missing = [key for key in model.model_fields if key not in sections and not texts.get(key)]
    assert not missing, f"write a docstring under these fields of {model.__name__}"


def test_importing_the_settings_reads_no_source() -> None:
    """pydantic would parse each class's source for its docstrings, in every process that reads a config."""
    for model in MODELS:
        assert not model.model_config.get("use_attribute_docstrings"), "config_page.py reads the docstrings"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_docstrings_of_fields_are_sentences(model: type[Settings]) -> None:
    texts = texts_of(model)
    assert not [
        text for text in texts.values() if not (text[0] in "`" or text[0].isupper()) or text[-1] != "."
    ]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_no_two_keys_have_the_same_text(model: type[Settings]) -> None:
    """A text that is said of two keys says of neither which of the two it is."""
    texts = texts_of(model)
    assert len(set(texts.values())) == len(texts)


class _Described(Settings):
    """A section."""

    first: str = "x|y"
    """The first key has a text of
    two lines."""
    second: float = Field(
        1e-8,
        gt=0,
    )
    """`second` has one line."""
    bare: int = 0
    limit: ClassVar[int] = 3

    def method(self) -> str:
        """It is no key."""
        return self.first


class _More(_Described):
    bare: int = 1
    """A class below gives the text."""


def test_the_docstring_under_a_field_is_its_text() -> None:
    first = {"first": "The first key has a text of two lines.", "second": "`second` has one line."}
    assert texts_of(_Described) == first
    assert texts_of(_More) == first | {"bare": "A class below gives the text."}


def test_names_of_a_table_are_the_values_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def second() -> None:
        """The second objective.

        More of it.
        """

    monkeypatch.setitem(OBJECTIVES, "second", Objective(second))  # type: ignore[arg-type]
    lines = document().splitlines()
    (row,) = [line for line in lines if line.startswith("| `objective`")]
    assert '| `"bce"`, `"focal"`, `"second"` |' in row
    assert "`bce`: Binary cross entropy." in row and row.endswith("`second`: The second objective. |")
    (row,) = [line for line in lines if line.startswith("| `loss`")]
    assert '| `""`, `"none"`, `"bce"`, `"focal"`, `"second"` |' in row


def test_no_name_in_angle_brackets_is_html() -> None:
    assert escaped("`a<b>` a<b> <b, c> 1 < 2 ``<d>``") == "`a<b>` a&lt;b> &lt;b, c> 1 < 2 ``<d>``"
    assert escaped(document()) == document() and "groups.&lt;name>" in document()


def test_the_page_has_defaults_and_bounds() -> None:
    page = document()
    for row in (
        "| `history_length` | `500` | integer from 1 to 1,000,000 |",
        '| `optimizer` | `"rowwise_adagrad"` | `"rowwise_adagrad"`, `"adagrad"`, `"sgd"` |',
        "| `validation` | required | text |",
        "| `hidden` | `[200, 80]` | list of integer from 1 to 65,536 |",
    ):
        assert row in page
    for heading in ("[data.search]", "[groups.<name>]", "[plan.tables.<name>]", "[[features]]", "[engine]"):
        assert f"### `{heading}`\n" in page
    assert "[model.branches" not in page, "its keys are those of [model]"
