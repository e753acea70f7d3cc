"""How an error reaches the user: one line on stderr, torchrun's summary, and an exit code."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

_EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)$", re.DOTALL)
USER_ERROR = 2
OTHER_ERROR = 1
# Errors of a write to a file that is open already: the system does not say which file.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def _prefix() -> str:
    """Names the rank where there are several, so that every rank's failure can be told apart."""
    rank = os.environ.get("RANK")
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"[rank {rank}] tandemrec" if rank is not None and several else "tandemrec"


def _hidden_package(error: ModuleNotFoundError) -> str | None:
    """Says so when an import failed because a foreign package hides one of ours; None otherwise."""
    package = (error.name or "").split(".")[0]
    if package not in ("pipelines", "trainer", "embeddings") or package not in sys.modules:
        return None
    places = [Path(place).resolve() for place in sys.modules[package].__path__]
    if Path(__file__).resolve().parent.parent / package in places:
        return None
    where = ", ".join(map(str, places))
    return f"package '{package}' in {where} hides tandemrec's own; uninstall or rename it, or change folder"


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the words of a command line, and where its help is."""
    context: Any = getattr(error, "ctx", None)
    verb = f" {context.info_name}" if context is not None and context.parent is not None else ""
    message = error.format_message().rstrip(".").removeprefix("Invalid value: ")
    extra = _EXTRA.match(message)
    if extra and context is not None:
        many = [one for one in context.command.params if one.param_type_name == "option" and one.multiple]
        sets = "=" in extra[1].split()[0]
        given = [
            one.opts[0] for one in many if context.params.get(one.name) and (one.opts[0] == "--set") == sets
        ]
        message = f"unexpected {extra[1]}: an option takes one value"
        if given:
            quote = "" if sets else ", or quote the pattern"
            message += f"; repeat {' or '.join(given)} before each{quote}"
        elif sets and any(one.opts[0] == "--set" for one in many):
            message = f"unexpected {extra[1]}: put --set before each"
    return f"{message}; see `tandemrec{verb} --help`"


def _system_message(error: OSError) -> str | None:
    if error.filename:
        return f"{error.filename}: {error.strerror}"
    if error.errno in _CANNOT_WRITE:
        return f"a file cannot be written: {error.strerror} (--debug shows which)"
    if "libnvidia-ml.so" in str(error):
        return f"the CUDA builds load only where an NVIDIA driver is ({error}); see `tandemrec doctor`"
    return None


def _user_message(error: Exception) -> str | None:
    """What to tell the user about an error of theirs; None when it is not one."""
    if isinstance(error, typer.TyperException):
        return _usage(error)
    if isinstance(error, ModuleNotFoundError):
        return _hidden_package(error)
    if isinstance(error, OSError):
        return _system_message(error)
    try:
        # Here and not at the top, so that `doctor` still starts where a foreign package hides ours.
        from embeddings.errors import TandemError
    except ImportError:
        return None
    return str(error) if isinstance(error, TandemError) else None


def _shown(text: str) -> str:
    """A text without credentials: packages repeat the whole address of a proxy, for one."""
    try:
        from trainer.storage import without_secrets
    except ImportError:
        return text
    return without_secrets(text)


def _tell_torchrun(message: str, consequence: bool) -> bool:
    """Put a rank's error into the file that torchrun's summary shows; does nothing without torchrun.

    Args:
        message: one line.
        consequence: the error only follows from another rank's.

    Returns:
        False where another rank of this node has said the very same already.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return True
    file = Path(place)
    # torchrun takes the earliest entry, in whole seconds, for the root cause.
    when = int(time.time()) + (1 if consequence else 0)
    entry = {"message": {"message": message, "extraInfo": {"timestamp": str(when)}}}
    # torchrun makes a folder for each attempt, with one in it for each rank.
    said = file.parent.parent / f"said-{hashlib.sha256(message.encode()).hexdigest()[:12]}"
    with suppress(OSError):
        file.write_text(json.dumps(entry), encoding="utf-8")
        try:
            said.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def report(error: Exception, debug: bool) -> int:
    """Prints an error as the contract of `launch.cli` says, and returns the exit code."""
    message = _user_message(error)
    if debug or message is None:
        print(_shown("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
    if message is None:
        # Not foreseen, hence a bug: the traceback is what a report needs, with or without --debug.
        text = f"internal error: {type(error).__name__}: {error}, see its traceback above"
        _tell_torchrun(_shown(text), False)
        print(f"{_prefix()}: internal error, see the traceback above", file=sys.stderr, flush=True)
        return OTHER_ERROR
    line, elsewhere = " ".join(_shown(message).split()), type(error).__name__ == "RankError"
    if _tell_torchrun(line, consequence=elsewhere):
        print(f"{_prefix()}: error: {line}", file=sys.stderr, flush=True)
    return OTHER_ERROR if elsewhere else USER_ERROR


@contextmanager
def reporting_thread_errors(debug: bool) -> Iterator[None]:
    """Within it, `report` shows the error of a thread that must end the process (trainer/ranks/heartbeat.py).

    It also drops the 80 lines that older releases of fbgemm log whenever they are imported: fbgemm 1.6 does
    not find itself in its own table of torch releases (`fbgemm_gpu/__init__.py`). `doctor` knows which
    releases go together. What fbgemm logs where a release does not suit has other words, and is shown.
    """

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            report(error, debug)

    before, sys.excepthook = sys.excepthook, show
    logging.getLogger().addFilter(_is_no_noise)
    try:
        yield
    finally:
        sys.excepthook = before


# Log messages that tell a user nothing. TorchRec 1.8 logs the second one in each step where tables without a
# cache lie beside tables with one of kind `sequence` (`prefetch` in distributed/embedding_lookup.py). Tables
# that have a cache are prefetched by embeddings/lookup.
_NOISE = ("_fbgemm_torch_compat_table has no entry for", "prefetch_pipeline must be set to True")


def _is_no_noise(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(words in message for words in _NOISE)
