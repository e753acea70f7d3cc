"""Numbers of every type that raw tables have, and the codes that they must become."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.columns import family
from pipelines.ingest.engine import connect
from pipelines.ingest.files import look
from pipelines.ingest.numbers import codes
from pipelines.ingest.sections import EngineConfig
from trainer.log.encoders.code import ABOVE, BELOW, LARGEST, MISSING
from trainer.log.encoders.encoder import Encoder
from trainer.log.encoders.mnse import Mnse

_REALS = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999999999999994, math.nan, math.inf, -math.inf]
_REALS += [1e300, -1e308, 2.0**52 + 1, 2.0**63, -(2.0**63), 4503599627370495.5, 0.07, 1.15, -0.29, 1e-320]
_TEXTS = ["0", "-0", "+5", "007", "-12", str(LARGEST), str(LARGEST + 1), str(-LARGEST - 2), "9" * 23]
_TEXTS += ["-" + "9" * 23, "1.5", "-2.5", "1e3", "nan", "inf", "-inf", "true", "1e999", "-1e999", " 4 ", ".5"]
COLUMNS: dict[str, tuple[pa.DataType, list[Any]]] = {
    "int64": (pa.int64(), [0, 1, -1, 2**53 + 1, LARGEST, -LARGEST, LARGEST + 1, -(2**63)]),
    "int8": (pa.int8(), [0, 127, -128]),
    "uint64": (pa.uint64(), [0, LARGEST, LARGEST + 1, 2**64 - 1]),
    "float64": (pa.float64(), _REALS),
    "float32": (pa.float32(), [0.5, 1.5, -0.25, math.nan]),
    "decimal": (
        pa.decimal128(38, 0),
        [Decimal(5), Decimal(10) ** 30, -(Decimal(10) ** 30), Decimal(LARGEST)],
    ),
    "money": (pa.decimal128(18, 2), [Decimal("1.15"), Decimal("-0.29"), Decimal("2.50")]),
    "text": (pa.string(), _TEXTS),
    "bool": (pa.bool_(), [True, False]),
}
ENCODERS: tuple[Encoder, ...] = (
    Mnse(kind="mnse", range=(-LARGEST, LARGEST)),
    Mnse(kind="mnse", range=(-1, 10), step=0.01),
)


def slow_code(value: Any, encoder: Encoder) -> int:
    """By the page docs/encoders.md, one value at a time."""
    if isinstance(value, str):
        word = value.strip()
        spelled = {"true": 1, "false": 0}.get(word)
        value = int(word) if word.lstrip("+-").isdigit() else float(word) if spelled is None else spelled
    if isinstance(value, Decimal) and value == value.to_integral_value() and value.as_tuple().exponent == 0:
        value = int(value)
    if value is None or math.isnan(value):
        return MISSING
    if isinstance(value, int) and encoder.step == 1:
        whole: float = int(value)
    else:
        share = float(value) / float(encoder.step)
        whole = math.floor(share + 0.5) if abs(share) < 2**52 else share
    low, high = encoder.limits
    if not low <= whole <= high:
        return ABOVE if whole > 0 else BELOW
    return int(whole) + 1 if whole >= 0 else int(whole)


def check_codes(engine_name: str, folder: Path) -> None:
    """An engine's codes of all columns are those of `slow_code`; a null comes last in each."""
    longest = 1 + max(len(values) for _, values in COLUMNS.values())
    padded = {name: values + [None] * (longest - len(values)) for name, (_, values) in COLUMNS.items()}
    table = {name: pa.array(padded[name], kind) for name, (kind, _) in COLUMNS.items()}
    table["place"] = pa.array(range(longest))
    file = folder / "numbers.parquet"
    pq.write_table(pa.table(table), file, row_group_size=5)
    engine = connect(
        engine_name, EngineConfig(threads=1, memory_limit="500MB"), folder / f"spill-{engine_name}"
    )
    try:
        raw = engine.scan([look(file, ("place",))])
        wanted = {
            f"{name}_{at}": codes(raw[f"c{place}"], family(COLUMNS[name][0]), encoder)
            for place, name in enumerate(COLUMNS)
            for at, encoder in enumerate(ENCODERS)
        }
        rows = engine.rows(raw.select(place=raw[f"c{len(COLUMNS)}"], **wanted))
    finally:
        engine.close()
    rows.sort(key=lambda row: row["place"])
    assert len(rows) == longest
    for name, given in table.items():
        for at, encoder in enumerate(ENCODERS if name != "place" else ()):
            expected = [slow_code(value, encoder) for value in given.to_pylist()]
            assert [row[f"{name}_{at}"] for row in rows] == expected, (name, encoder.step)
