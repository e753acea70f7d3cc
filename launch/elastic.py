"""What a failing rank leaves for torchrun, whose summary is the last thing on the screen."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path


def leave_word(message: str, consequence: bool) -> bool:
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
