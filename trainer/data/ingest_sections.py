"""Sections of the ingest settings: labels, and the tables beside the events."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trainer.settings import Settings


class LabelConfig(Settings):
    """A task's label column; `click = "c"` is short for `click = { column = "c" }`.

    Attributes:
        column: of the impressions table.
        kind: `binary`, 0 or 1 (or false and true), or a `probability`, anything from 0 to 1.
        positive_from: the column holds other numbers (ratings, say), and the label is 1 from this one on.
    """

    column: str
    kind: Literal["binary", "probability"] = "binary"
    positive_from: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.positive_from is not None and self.kind == "probability":
            raise ValueError("positive_from makes a label binary: leave kind out")
        return self


def _label(given: Any) -> Any:
    return {"column": given} if isinstance(given, str) else given


Label = Annotated[LabelConfig, BeforeValidator(_label)]


class ItemTableConfig(Settings):
    """A table with one row an item, if there is one: its features of items are taken for constant.

    Attributes:
        files: paths or patterns, as for `--events`; item: the column with the item.
    """

    files: tuple[str, ...] = ()
    item: str = "item_id"


class UserTableConfig(Settings):
    """A table with one row a user, if there is one, for `[[context]]` with `table = "users"`.

    Attributes:
        files: paths or patterns, as for `--events`; user: the column with the user.
    """

    files: tuple[str, ...] = ()
    user: str = "user_id"
