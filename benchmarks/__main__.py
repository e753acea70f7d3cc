"""`tandemrec bench NAME ...`, or `python -m benchmarks NAME ...`: runs one subject.

A subject is a file of this folder, or a folder with a `__main__.py`; its function `main` gets the words after
its name.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from embeddings.errors import ConfigError, hint_of

FOLDER = Path(__file__).resolve().parent


def subjects() -> dict[str, Path]:
    """The file of each subject, by its name. Finding them imports none of them."""
    files = {path.stem: path for path in FOLDER.glob("[a-z]*.py")}
    return dict(sorted((files | {path.parent.name: path for path in FOLDER.glob("*/__main__.py")}).items()))


def title(path: Path) -> str:
    """What a subject measures: the first line of its file's docstring."""
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return words.partition("\n")[0].rstrip(".")


def main(words: Sequence[str]) -> int:
    """Run a subject; returns the exit code.

    Raises:
        ConfigError: there is no such subject.
    """
    known = subjects()
    if not words or words[0] in ("-h", "--help"):
        print("tandemrec bench NAME [OPTIONS]: measure a part of the trainer beside its baseline.\n")
        print("\n".join(f"  {name:12} {title(path)}" for name, path in known.items()))
        print("\nOptions of one of them: tandemrec bench NAME --help. More: benchmarks/README.md")
        return 0
    name, *rest = words
    if name not in known:
        hint = hint_of(name, known, "see `tandemrec bench --help`")
        raise ConfigError(f"{name!r} is not one of {', '.join(known)}; {hint}")
    folder = known[name].name == "__main__.py"
    subject = importlib.import_module(f"benchmarks.{name}.__main__" if folder else f"benchmarks.{name}")
    return subject.main(rest) or 0


if __name__ == "__main__":
    # Errors are reported as those of every other verb.
    from launch.cli import main as launch

    sys.exit(launch(["bench", *sys.argv[1:]]))
