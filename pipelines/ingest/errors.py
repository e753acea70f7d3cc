"""What an engine says of tables, disks and memory, as one line that tells what to do."""

from __future__ import annotations

import re

from embeddings.errors import ConfigError, DataError, TandemError

_MEMORY = re.compile(r"^Out of Memory Error|OutOfMemory|GC overhead limit", re.IGNORECASE)
_DISK = re.compile(r"No space left|offload data block|max_temp_directory_size|Disk quota|database is full")
_FILE = re.compile(
    r"^(IO|Permission|HTTP) Error|IOException|FileNotFound|FAILED_READ_FILE"
    r"|Failed to read file|decompress|TProtocolException",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"^(Conversion|Invalid Input|Out of Range|Mismatch Type|Type|Invalid type|Constraint|Serialization) Error"
    r"|CAST_|MALFORMED|OVERFLOW|NumberFormat|DateTimeException|ArithmeticException|BadRecord",
    re.IGNORECASE,
)
_OURS = re.compile(r"^(INTERNAL|FATAL|Parser|Syntax) Error|^\[INTERNAL_ERROR", re.IGNORECASE)


def explained(text: str) -> TandemError | None:
    """An engine's error for the user; None where neither data nor machine can be at fault, but this code."""
    line = _line(text)
    if _OURS.search(line):
        return None
    if _DISK.search(text):
        problem = "the disk under --out has no room for the tables between two steps"
        return DataError(f"{problem}: {line}; free some, or write to another disk")
    if _MEMORY.search(line):
        problem = f"raise engine.memory_limit or engine.buckets ({line})"
        return ConfigError(f"engine.memory_limit is too small for these tables: {problem}")
    if _FILE.search(line):
        return DataError(f"the engine cannot read or write a file: {line}; mend that, and ingest again")
    if _VALUE.search(line):
        problem = f"the tables hold a value that does not fit its column: {line}"
        return DataError(f"{problem}; mend it, or name the column in text_columns")
    problem = f"the engine cannot work with these tables: {line}"
    return DataError(f"{problem}; look at the names and types of their columns")


def _line(text: str) -> str:
    """The one line of a message that says something: of a Java trace the last cause."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    called = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    return (causes[-1:] or called or lines or ["no reason given"])[0]
