"""Serving snapshots: JSON and safetensors only, no pickle, and never trusted unverified.

    SNAP/LATEST                     name of the newest version; moves last
    SNAP/v00000001/manifest.json    config, features, groups, search, size and SHA-256 of every file
    SNAP/v00000001/manifest.sha256  digest of manifest.json itself
    SNAP/v00000001/tables/<group>.<place>.safetensors       rows of one table, fp32, fp16 or int8
    SNAP/v00000001/tables/<group>.<place>.ids.safetensors   which rows these are, where they are a delta
    SNAP/v00000001/search/<branch>.<place>.safetensors      the same for what a retrieval service wants
    SNAP/v00000001/ids/<n>.safetensors    which raw ids have a row, where ids come and go
    SNAP/v00000001/dense.safetensors
    SNAP/v00000001/recorded.safetensors   a few requests, the trainer's scores of them and the snapshot's own
    SNAP/v00000001/code/*.pt2             only where asked for; never read here

docs/snapshots.md describes the format. Loading checks every digest, then every tensor's name, type and shape
against the config, and replays the recorded requests on demand.
"""

from trainer.snapshot.fetching import load_fetched, shown
from trainer.snapshot.loading import Snapshot, load_search, load_snapshot
from trainer.snapshot.resolving import exported_at, resolve

__all__ = ["Snapshot", "exported_at", "load_fetched", "load_search", "load_snapshot", "resolve", "shown"]
