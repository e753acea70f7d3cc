"""Ingest of raw input larger than its memory limit: seconds and peak memory of the whole process

    tandemrec bench ingest generate --out RAW --gigabytes 10 [--format csv]
    tandemrec bench ingest measure --raw RAW --out LOG --memory-limit 1GB [--vocabulary LOG]

`generate` writes a shop's event log, one file a day, events in the order of time: event_type, product_id,
category_id, brand, price, user_id, user_session. Products follow a bounded Zipf law (exponent 1), users'
activity a Pareto law (exponent 1.2), so that histories have a heavy tail. The seed decides every byte.
`measure` runs `tandemrec ingest` (leave-last) in a process of its own and asks the kernel for that process's
peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.harness.timing import time_process

DAY, START = 86_400, 1_704_067_200  # 2024-01-01
FILES, CHUNK = 64, 250_000
PRODUCTS, CATEGORIES, BRANDS = 1_000_000, 2_000, 5_000
EVENTS_PER_USER = 100  # on average
CSV_BYTES, PARQUET_BYTES = 113, 33  # of a row, about
CONFIG = """
protocol = "leave-last"
task = "click"
[events]
item = "product_id"
taxonomy = ["category_id"]
[[features]]
name = "brand"
[[features]]
name = "event_type"
side = "history"
[requests]
negatives = 2
min_events = 100
"""

Ints = npt.NDArray[np.int64]


def _sessions(user: Ints, day: int) -> pa.Array:
    """32 hexadecimal digits that a user's events of one day share."""
    mixed = np.stack([(user + day * 7919) * odd for odd in (0x9E3779B97F4A7C15 - 2**64, 0x2545F4914F6CDD1D)])
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    octets = np.ascontiguousarray(mixed.T).view(np.uint8).reshape(user.size, 16)
    text = np.stack([digits[octets >> 4], digits[octets & 15]], axis=2).reshape(-1)
    offsets = np.arange(0, 32 * user.size + 1, 32, dtype=np.int32)
    return pa.StringArray.from_buffers(user.size, pa.py_buffer(offsets), pa.py_buffer(text))


def _chunks(seed: int, day: int, rows: int, ends: npt.NDArray[np.float64]) -> Iterator[pa.Table]:
    """One day's events in the order of time; `ends` is the running sum of the users' activity."""
    rng = np.random.default_rng([seed, day])
    kinds, brands = (
        pa.array(["view", "cart", "purchase"]),
        pa.array([f"brand-{i:04d}" for i in range(BRANDS)]),
    )
    for first in range(0, rows, CHUNK):
        size = min(CHUNK, rows - first)
        user = np.searchsorted(ends, rng.random(size) * ends[-1], side="right").astype(np.int64)
        # The integer part of N ** U has the probabilities of a bounded Zipf law.
        rank = (PRODUCTS ** rng.random(size)).astype(np.int64)
        product = rank * 7_368_787 % 99_999_989  # ids do not tell how popular a product is
        moment = np.sort((first + rng.random(size) * size) / rows * DAY).astype(np.int64)
        yield pa.table(
            {
                "timestamp": START + day * DAY + moment,
                "event_type": kinds.take(pa.array(rng.choice(3, size, p=(0.92, 0.06, 0.02)))),
                "product_id": product,
                "category_id": 2_053_013_552_000_000_000 + product % CATEGORIES * 104_729,
                "brand": brands.take(pa.array(product // 7 % BRANDS)),
                "price": np.round(np.exp(3 + product % 997 / 250), 2),
                "user_id": 500_000_000 + user,
                "user_session": _sessions(user, day),
            }
        )


def generate(out: Path, gigabytes: float, form: str, seed: int) -> None:
    """Write the raw tables into `out` and print how many rows and bytes they have."""
    out.mkdir(parents=True)
    events = int(gigabytes * 1e9 / (CSV_BYTES if form == "csv" else PARQUET_BYTES))
    users = max(1, events // EVENTS_PER_USER)
    # Whoever does a thousand times what others do is a machine, and left out by most shops.
    ends = np.cumsum(np.minimum(np.random.default_rng(seed).pareto(1.2, users) + 0.05, 2_000))
    for day in range(FILES):
        rows = events * (day + 1) // FILES - events * day // FILES
        path = out / f"events-{day:02d}.{form}"
        chunks = _chunks(seed, day, rows, ends)
        head = next(chunks)
        with (
            pc.CSVWriter(path, head.schema)
            if form == "csv"
            else pq.ParquetWriter(path, head.schema, compression="zstd")
        ) as writer:
            writer.write_table(head)
            for chunk in chunks:
                writer.write_table(chunk)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(json.dumps({"events": events, "users": users, "bytes": size, "files": FILES, "seed": seed}))


def measure(given: argparse.Namespace) -> None:
    """Ingest `given.raw` into `given.out`."""
    raw, out = given.raw, given.out
    config = out.with_name(f"{out.name}.toml")
    config.write_text(CONFIG)
    overrides = [f"engine.memory_limit={given.memory_limit}", *given.overrides]
    form = next(raw.iterdir()).suffix
    command = [sys.executable, "-m", "launch.cli", "ingest", "--events", f"{raw}/*{form}"]
    command += ["--config", str(config), "--out", str(out)]
    command += ["--vocabulary", str(given.vocabulary)] if given.vocabulary else []
    command += [word for override in overrides for word in ("--set", override)]
    report = Report(given, "Ingest")
    seconds, peak = time_process(command)
    told = json.loads((out / "manifest.json").read_text())["report"]
    figures = {
        "raw_bytes": sum(path.stat().st_size for path in raw.iterdir()),
        "events": told["events"],
        "seconds": round(seconds.wall, 1),
        "cpu_seconds": round(seconds.cpu, 1),
        "peak_rss_mb": round(peak / 1e6),
        "memory_limit": given.memory_limit,
        "log_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }
    report.rows = [figures]
    report.table({name: f"{{{name}}}" for name in figures}, report.rows)
    report.close()


def main(words: Sequence[str]) -> None:
    options = Options("ingest", __doc__)
    options.add_argument("verb", choices=("generate", "measure"))
    options.add_argument("--out", type=Path, required=True, help="the raw files, or the log")
    options.add_argument("--gigabytes", type=float, default=10.0, help="to generate")
    options.add_argument("--format", choices=("csv", "parquet"), default="csv", help="to generate")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--raw", type=Path, help="to measure: what was generated")
    options.add_argument("--memory-limit", default="1GB")
    options.add_argument("--vocabulary", type=Path)
    options.overriding()
    given = options.read(words)
    if given.verb == "generate":
        generate(given.out, given.gigabytes, given.format, given.seed)
    elif given.raw is None:
        options.error("name the raw files with --raw")
    else:
        measure(given)
