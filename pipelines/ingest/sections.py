"""Sections of the ingest settings: labels, tables beside the events, and how files are read and written."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from trainer.config.toml import Settings
from trainer.ranks.machine import memory_bytes


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
        files: paths or patterns, as for `--events`, from the current folder; item: the column with the item.
    """

    files: tuple[str, ...] = ()
    item: str = "item_id"


class UserTableConfig(Settings):
    """A table with one row a user, if there is one, for `[[context]]` with `table = "users"`.

    Attributes:
        files: paths or patterns, as for `--events`, from the current folder; user: the column with the user.
    """

    files: tuple[str, ...] = ()
    user: str = "user_id"


class CsvConfig(Settings):
    """How tables of text are written.

    Attributes:
        delimiter: between two cells; empty: a comma, tab, semicolon or bar, as the header of each file says.
        nulls: words that mean no value, as an empty cell does.
    """

    delimiter: str = ""
    nulls: tuple[str, ...] = ()

    @field_validator("delimiter")
    @classmethod
    def _is_one_sign(cls, value: str) -> str:
        if len(value) > 1 or value in ('"', "\r", "\n"):
            raise ValueError("is one sign, no quote or line end; write the files anew, with tabs for example")
        return value


class VocabularyConfig(Settings):
    """Where the ids come from: counted anew, or those of the older log `log`, whose values keep them.

    Attributes:
        log: a sequence log's folder; empty: count anew.
        extend: values that `log` does not know get new ids after its own; otherwise they are unknown.
    """

    log: str = ""
    extend: bool = False

    @model_validator(mode="after")
    def _extends_something(self) -> Self:
        if self.extend and not self.log:
            raise ValueError("extend needs an older log: give vocabulary.log, or --vocabulary LOG")
        return self


class FilesConfig(Settings):
    """The layout of the Parquet files.

    Attributes:
        rows_per_group: rows of a row group, which is decoded whole.
        rows_per_file: rows of a file, a multiple of `rows_per_group`.
        layout: a row is a `user` with all requests, or one `request` with the history as of it.
        max_history: newest behaviors a request row keeps; 0 = all.
        order: of the rows: a seeded `shuffle`, or by request `time` (request rows only).
    """

    rows_per_group: int = Field(default=64, ge=1)
    rows_per_file: int = Field(default=1024, ge=1)
    layout: Literal["user", "request"] = "user"
    max_history: int = Field(default=0, ge=0)
    order: Literal["shuffle", "time"] = "shuffle"

    @model_validator(mode="after")
    def _choices_fit(self) -> FilesConfig:
        if self.rows_per_file % self.rows_per_group:
            sizes = f"rows_per_file ({self.rows_per_file}) and rows_per_group ({self.rows_per_group})"
            raise ValueError(f"{sizes}: the first must be a multiple of the second")
        if self.layout == "user" and (self.max_history or self.order == "time"):
            raise ValueError('max_history and order = "time" need layout = "request"')
        return self


class EngineConfig(Settings):
    """What the query engine may use. None of it changes the log.

    Attributes:
        threads: 0 = every core.
        memory_limit: of the whole process with DuckDB; of the driver's heap with Spark. No more than the
            machine, or the container, has.
        buckets: groups of users that are put together one after the other; 0 = as memory_limit asks.
    """

    threads: int = Field(default=0, ge=0)
    memory_limit: str = Field(default="4GB", pattern=r"^[1-9][0-9]*(MB|GB|TB|MiB|GiB|TiB)$")
    buckets: int = Field(default=0, ge=0, le=4096)

    @property
    def memory_bytes(self) -> int:
        """`memory_limit` as a number, but no more than this process may take at all."""
        digits = self.memory_limit.rstrip("iBMGT")
        unit = self.memory_limit[len(digits) :]
        power = " MGT".index(unit[0]) + 1
        base = 1024 if "i" in unit else 1000
        return min(int(digits) * int(base**power), memory_bytes())
