"""The disk that a folder of this machine is on, or is to be on."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePath


def free_disk(folder: Path) -> int | None:
    """Free bytes; None where nobody says, as of an object store, which has no bounds."""
    if not isinstance(folder, PurePath):
        return None
    try:
        return shutil.disk_usage(_there(folder)).free
    except OSError:
        return None


def same_disk(one: Path, other: Path) -> bool:
    """Whether what is written into two folders takes the room of one disk."""
    if not (isinstance(one, PurePath) and isinstance(other, PurePath)):
        return False
    return _there(one).stat().st_dev == _there(other).stat().st_dev


def _there(folder: Path) -> Path:
    """A folder, or the nearest above it that exists."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
