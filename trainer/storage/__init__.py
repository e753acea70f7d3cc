"""Where logs, runs and snapshots lie: folders of this machine, or places in an object store.

A *place* is a `pathlib.Path`, or a `upath.UPath` (universal-pathlib over fsspec), which has the same methods.
Nothing here is loaded for local paths but the standard library.
"""

from trainer.storage.addresses import refuse_secrets, without_secrets
from trainer.storage.places import Place, is_remote, place

__all__ = ["Place", "is_remote", "place", "refuse_secrets", "without_secrets"]
