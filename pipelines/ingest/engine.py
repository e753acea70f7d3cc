"""The engines that run ingest's expressions: DuckDB in this process, or Spark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr import types as ir

from embeddings.errors import ConfigError, DataError
from pipelines.ingest.faults import explain
from pipelines.ingest.files import RawFile
from pipelines.ingest.sections import EngineConfig
from trainer.sealed_folder import remove_folder

Rows = list[dict[str, Any]]
Result = TypeVar("Result")
ENGINES = ("duckdb", "spark")
# Bytes of the memory limit that DuckDB leaves to Python, its libraries, and the rows being written.
_PYTHON = 300_000_000
# Paths as they are, and no columns from the names of folders.
_SPARK_EXACTLY = {"__globPaths__": "false", "recursiveFileLookup": "true"}
_SPARK_PLAIN = "timestamp_ntz"
_SPARK_SQL = {
    "spark.sql.caseSensitive": "true",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.legacy.parquet.nanosAsLong": "true",
}


class Engine(Protocol):
    """What ingest needs of an engine.

    Attributes:
        bounded: it wants users in buckets to respect a memory limit.
        lenient: it takes CSV that is broken, or no UTF-8, for something else, and says nothing.
    """

    bounded: bool
    lenient: bool

    def scan(self, files: Sequence[RawFile]) -> ir.Table:
        """Files of one format with the same columns in the same order, which become c0, c1, ...

        Exactly these files are read: no character of a path is a pattern, and no folder is a column.
        Cells of CSV are text.
        """

    def split(self, text: ir.Value, separator: str) -> ir.Value:
        """Text cut at a separator, which stands for itself."""

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        """Computes the table now, so that what uses it twice does not compute it twice."""

    def append(self, name: str, table: ir.Table) -> ir.Table:
        """Adds rows to what `append` has kept under this name, and gives all of it."""

    def table(self, name: str) -> ir.Table:
        """What is kept under a name."""

    def query(self, sql: str, schema: Mapping[str, Any]) -> ir.Table:
        """What SQL in DuckDB's dialect gives, over tables that are kept; its columns and their types."""

    def drop(self, name: str) -> None: ...

    def rows(self, table: ir.Table) -> Rows:
        """A small result."""

    def stream(self, table: ir.Table, size: int) -> Iterator[pa.RecordBatch]: ...

    def close(self) -> None: ...


def connect(name: str, config: EngineConfig, spill: Path) -> Engine:
    """Starts an engine that keeps its intermediate tables under `spill`.

    Raises:
        ConfigError: no engine of that name, or Spark is not installed.
    """
    spill.mkdir(parents=True, exist_ok=True)
    if name == "duckdb":
        return DuckEngine(config, spill)
    if name == "spark":
        return SparkEngine(config, spill)
    raise ConfigError(f"--engine {name}: choose {' or '.join(ENGINES)}")


class DuckEngine:
    """DuckDB on a database file, so that what does not fit the memory limit is read again from disk."""

    bounded, lenient = True, False

    def __init__(self, config: EngineConfig, spill: Path) -> None:
        limit = max(config.memory_bytes - _PYTHON, config.memory_bytes // 2)
        settings = {"memory_limit": f"{limit >> 20}MiB", "temp_directory": str(spill / "temp")}
        if config.threads:
            settings["threads"] = str(config.threads)
        self._duck: Any = self._run(lambda: _connect_duckdb(spill / "tables.duckdb", settings))
        self._appended: set[str] = set()
        # DuckDB 2.0.0 keeps N - 1 rows instead of N where "row_number() - 1 < N" (Ibis' row_number) stands
        # in a common table expression: this rewrite reads the "< N" as if nothing were subtracted.
        self._duck.con.execute("SET disabled_optimizers = 'top_n_window_elimination'")
        # A time without a zone is UTC, wherever this runs.
        self._duck.con.execute("SET TimeZone = 'UTC'")
        # No result here depends on the order of a table, and keeping it costs memory.
        self._duck.con.execute("SET preserve_insertion_order = false")

    def scan(self, files: Sequence[RawFile]) -> ir.Table:
        first, name = files[0], ibis.util.gen_name("raw")
        paths = ", ".join(_quoted(_literal(file.path)) for file in files)
        columns = [f"c{place}" for place in range(len(first.columns))]
        if first.format == "Parquet":
            # By place, since DuckDB takes `cat` and `CAT` for one name.
            source = f"read_parquet([{paths}], hive_partitioning = false) AS raw({', '.join(columns)})"
        else:
            options = {
                "columns": "{" + ", ".join(f"'{column}': 'VARCHAR'" for column in columns) + "}",
                "delim": _quoted(first.delimiter),
                "compression": "'gzip'" if first.packed else "'none'",
                "auto_detect": "false",
                "header": "true",
                "quote": "'\"'",
                "escape": "'\"'",
                "hive_partitioning": "false",
            }
            settings = ", ".join(f"{key} = {value}" for key, value in options.items())
            source = f"read_csv([{paths}], {settings})"
        chosen = ", ".join(_duck_column(first, place) for place in range(len(columns)))
        self._run(
            lambda: self._duck.con.execute(f'CREATE TEMP VIEW "{name}" AS SELECT {chosen} FROM {source}')
        )
        return self._duck.table(name)

    def split(self, text: ir.Value, separator: str) -> ir.Value:
        return text.split(separator)

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        # Not create_table: it makes an empty table first, and to overwrite says what is no SQL to DuckDB 2.
        return self._store(f'CREATE OR REPLACE TABLE "{name}" AS', name, table)

    def append(self, name: str, table: ir.Table) -> ir.Table:
        there = name in self._appended
        self._appended.add(name)
        return self._store(f'INSERT INTO "{name}"' if there else f'CREATE TABLE "{name}" AS', name, table)

    def _store(self, verb: str, name: str, table: ir.Table) -> ir.Table:
        # DuckDB's sums are wider than Ibis believes, so that its own casts to int64 are left out.
        whole = [column for column, kind in table.schema().items() if kind.is_int64()]
        columns = ", ".join(f'"{column}"::BIGINT AS "{column}"' for column in whole)
        replaced = f"* REPLACE ({columns})" if whole else "*"
        query = f"{verb} SELECT {replaced} FROM ({_sql_of(table, 'duckdb')})"
        self._run(lambda: self._duck.con.execute(query))
        return self._duck.table(name)

    def table(self, name: str) -> ir.Table:
        return self._duck.table(name)

    def query(self, sql: str, schema: Mapping[str, Any]) -> ir.Table:
        return self._duck.sql(sql, schema=schema, dialect="duckdb")

    def drop(self, name: str) -> None:
        self._run(lambda: self._duck.con.execute(f'DROP TABLE IF EXISTS "{name}"'))

    def rows(self, table: ir.Table) -> Rows:
        return cast(Rows, self._run(lambda: self._query(table).to_arrow_table().to_pylist()))

    def stream(self, table: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
        # Not table.to_pyarrow_batches(): Ibis 12 calls a method that DuckDB 2 no longer has.
        reader = self._run(lambda: self._query(table).to_arrow_reader(size))
        while (batch := self._run(lambda: next(reader, None))) is not None:
            yield batch

    def close(self) -> None:
        self._duck.disconnect()

    def _query(self, table: ir.Table) -> Any:
        return self._duck.con.sql(_sql_of(table, "duckdb"))

    def _run(self, work: Callable[[], Result]) -> Result:
        import duckdb

        try:
            return work()
        except (duckdb.Error, OSError, pa.ArrowException) as error:
            # While rows stream they come through Arrow, which has its own error for those of DuckDB.
            text = str(error)
            known = isinstance(error, duckdb.Error) or re.match(r"[\w ]+ Error: ", text)
            told = explain(text) if known else None
            if told is None:
                raise
            raise told from error


def _sql_of(table: ir.Table, dialect: str) -> str:
    """The query of an expression, whatever engine its tables belong to."""
    return _compiled(table.unbind().op(), dialect)


@lru_cache(512)
def _compiled(query: Any, dialect: str) -> str:
    """Ibis takes tens of milliseconds for a query; buckets, splits and later ingests ask the same ones."""
    return str(ibis.to_sql(query.to_expr(), dialect=dialect, pretty=False))


def _connect_duckdb(file: Path, settings: Mapping[str, str]) -> Any:
    import duckdb

    try:
        return ibis.duckdb.connect(str(file), **settings)
    except duckdb.IOException as error:
        if "Could not set lock" not in str(error):
            raise
        # A shared folder without locks. What does not fit in memory goes to temporary files then.
        return ibis.duckdb.connect(":memory:", **settings)


class SparkEngine:
    """Spark: in this process, or on the cluster to which spark-submit sent this driver.

    Intermediate tables are Parquet files under `spill`, which driver and executors must both reach.
    """

    bounded, lenient = False, True

    def __init__(self, config: EngineConfig, spill: Path) -> None:
        try:
            from pyspark.sql import SparkSession
        except ImportError as error:
            problem = "pip install -r requirements/spark.txt (and Java 17 or later)"
            raise ConfigError(f"--engine spark needs PySpark: {problem}") from error
        self._mine = SparkSession.getActiveSession() is None
        builder = SparkSession.builder.appName("tandemrec ingest")
        # spark-submit has settled these already; there they change nothing.
        builder = builder.config("spark.driver.memory", f"{config.memory_bytes >> 20}m")
        builder = builder.config("spark.ui.showConsoleProgress", "false")
        if config.threads:
            builder = builder.config("spark.master", f"local[{config.threads}]")
            builder = builder.config("spark.sql.shuffle.partitions", str(2 * config.threads))
        self._session: Any = builder.getOrCreate()
        self._before = {key: self._session.conf.get(key, None) for key in _SPARK_SQL}
        for key, value in _SPARK_SQL.items():
            self._session.conf.set(key, value)
        self._spark: Any = ibis.pyspark.connect(self._session)
        self._spill = spill

    def scan(self, files: Sequence[RawFile]) -> ir.Table:
        first = files[0]
        for file in files:
            if file.path.name.startswith(("_", ".")):
                raise DataError("Spark skips files whose name begins with _ or .; rename it", file=file.path)
        try:
            return self._view(self._frame_of(files))
        except Exception as error:
            problem = f"Spark cannot read this file, or one beside it: {str(error).splitlines()[0]}"
            raise DataError(problem, file=first.path) from error

    def _frame_of(self, files: Sequence[RawFile]) -> Any:
        first, paths = files[0], [str(file.path.absolute()) for file in files]
        columns = [f"c{place}" for place in range(len(first.columns))]
        reader = self._session.read.options(**_SPARK_EXACTLY)
        if first.format == "CSV":
            from pyspark.sql.types import StringType, StructField, StructType

            # Spark warns of every header that differs from the schema; it cannot have one name twice.
            unique = len(set(first.columns)) == len(first.columns)
            names = first.columns if unique else columns
            schema = StructType([StructField(name, StringType()) for name in names])
            options = {"sep": first.delimiter, "header": True, "escape": '"', "multiLine": True}
            return reader.options(mode="FAILFAST", **options).schema(schema).csv(paths).toDF(*columns)
        frame = reader.parquet(*paths).toDF(*columns)
        # Times without a zone, which Ibis does not know; this session's zone is UTC.
        plain = {name: frame[name].cast("timestamp") for name, kind in frame.dtypes if kind == _SPARK_PLAIN}
        return frame.withColumns(plain) if plain else frame

    def split(self, text: ir.Value, separator: str) -> ir.Value:
        # Spark takes a regular expression.
        return text.split(re.escape(separator))

    def keep(self, name: str, table: ir.Table) -> ir.Table:
        return self._store("overwrite", name, table)

    def append(self, name: str, table: ir.Table) -> ir.Table:
        return self._store("append", name, table)

    def _store(self, mode: str, name: str, table: ir.Table) -> ir.Table:
        path = self._spill / name
        self._run(lambda: self._frame(table).write.mode(mode).parquet(str(path)))
        return self._view(self._session.read.options(**_SPARK_EXACTLY).parquet(str(path)), name)

    def table(self, name: str) -> ir.Table:
        return self._spark.table(name)

    def query(self, sql: str, schema: Mapping[str, Any]) -> ir.Table:
        return self._spark.sql(sql, schema=schema, dialect="duckdb")

    def drop(self, name: str) -> None:
        self._session.catalog.dropTempView(name)
        remove_folder(self._spill / name)

    def rows(self, table: ir.Table) -> Rows:
        return self._run(lambda: [row.asDict(recursive=True) for row in self._frame(table).collect()])

    def stream(self, table: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
        path = self._spill / "rows"
        self._run(lambda: self._frame(table).write.mode("overwrite").parquet(str(path)))
        # Spark sorts by ranges, one a file, and numbers the files in that order.
        for file in sorted(path.glob("part-*.parquet")):
            with pq.ParquetFile(file) as parquet:
                yield from parquet.iter_batches(size)
        remove_folder(path, strict=True)

    def close(self) -> None:
        if self._mine:
            self._session.stop()
            return
        for key, value in self._before.items():
            self._session.conf.unset(key) if value is None else self._session.conf.set(key, value)

    def _run(self, work: Callable[[], Result]) -> Result:
        from py4j.protocol import Py4JError  # type: ignore[import-untyped]
        from pyspark.errors import PySparkException

        try:
            return work()
        except (PySparkException, Py4JError) as error:
            told = explain(str(error))
            if told is None:
                raise
            raise told from error

    def _frame(self, table: ir.Table) -> Any:
        return self._session.sql(_sql_of(table, "pyspark"))

    def _view(self, frame: Any, name: str = "") -> ir.Table:
        name = name or ibis.util.gen_name("raw")
        frame.createOrReplaceTempView(name)
        return self._spark.table(name)


def count_rows(engine: Engine, table: ir.Table) -> int:
    """How many rows a table has."""
    return int(engine.rows(table.aggregate(rows=table.count()))[0]["rows"])


def _duck_column(file: RawFile, place: int) -> str:
    """Nanoseconds as a number, as Spark gives them: Ibis knows no such time with a zone.

    DuckDB believes the least and greatest value that Parquet states, which leave NaN out: isnan() is false
    then, and x <= greatest true. What comes out of a list has no such statement.
    """
    name = file.columns[place]
    kind = file.types.get(name) if file.columns.count(name) == 1 else None
    if kind is not None and pa.types.is_timestamp(kind) and kind.unit == "ns":
        return f"epoch_ns(c{place}) AS c{place}"
    if kind is not None and pa.types.is_floating(kind):
        return f"list_value(c{place})[1] AS c{place}"
    return f"c{place}"


def _literal(path: Path) -> str:
    """A path as a pattern of DuckDB that only this path fits."""
    exact = str(path.absolute())
    if not any(sign in exact for sign in "*?["):
        return exact
    if "\\" in exact:
        problem = "DuckDB cannot open a path with a backslash beside *, ? or [; rename the file"
        raise DataError(problem, file=path)
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in exact)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
