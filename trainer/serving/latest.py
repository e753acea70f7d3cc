"""What a folder of versions says beside the version that is served: a newer one, or what is wrong there.

A version is told from others by the digest of its manifest. Its name alone says little: whoever deletes a
folder of versions and exports into it anew begins with the first number again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embeddings.errors import SnapshotError, TandemError, UnavailableError
from trainer.sealed_folder import DIGEST
from trainer.snapshot.manifest import LATEST, VERSION_NAME

# What a look at LATEST finds:
#     served       it names the version that is served
#     newer        another one, which may be taken
#     mended       the one that is served, whose files were written over or whose answers were no numbers; its
#                  files are as they were, so it is taken anew
#     refused      the one that was refused
#     older        one with a smaller number than the one that is served
#     replaced     the name of the one that is served, and the folder holds another one now
#     overwritten  a file of the version that is served was written over where it lies
#     broken       there is no LATEST, or it names no version
#     unreachable  a store or a disk does not answer
Outcome = Literal[
    "served", "newer", "mended", "refused", "older", "replaced", "overwritten", "broken", "unreachable"
]


@dataclass(frozen=True)
class Sealed:
    """A version as it was found.

    Attributes:
        path: its folder; digest: of its manifest, as the version says it; empty where it says none.
    """

    path: Path
    digest: str

    @classmethod
    def at(cls, path: Path) -> Sealed:
        """The version in a folder, which need not be there.

        Raises:
            UnavailableError: the store or the disk does not answer.
        """
        try:
            with (path / DIGEST).open("rb") as file:
                return cls(path, file.read(200).decode("ascii", "replace").strip())
        except (FileNotFoundError, NotADirectoryError):
            return cls(path, "")
        except OSError as error:
            raise UnavailableError(path / DIGEST, f"cannot be read: {error.strerror or error}") from None


@dataclass(frozen=True)
class Look:
    """What a look found: the version that LATEST names, if it names one, and what is wrong, if anything."""

    outcome: Outcome
    version: Sealed | None = None
    problem: TandemError | None = None


def compare(found: Sealed, served: Sealed, refused: Sealed | None, root: Path) -> Look:
    """What the version that LATEST names is to the one that is served."""
    if found == served:
        return Look("served", found)
    if found == refused:
        return Look("refused", found)
    mine, name = served.path.name, found.path.name
    if name == mine:
        problem = f"is another version than the {name} that is served, which had the same name"
        return Look("replaced", found, SnapshotError(found.path, f"{problem}; {_how_to_take(name)}"))
    if VERSION_NAME.fullmatch(name) and VERSION_NAME.fullmatch(mine) and name < mine:
        problem = f"names {name}, which is older than the {mine} that is served"
        return Look("older", found, SnapshotError(root / LATEST, f"{problem}; {_how_to_take(name)}"))
    return Look("newer", found)


def _how_to_take(name: str) -> str:
    return f"if {name} is meant, ask for it by POST /reload or start the server anew"
