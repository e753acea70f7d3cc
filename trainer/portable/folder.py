"""The folder of a portable model: sealed like every other, and of a kind of its own.

DIR/model.onnx, model.pt2     the whole scorer; tables/ beside model.onnx where they are not in it
DIR/dense.onnx, dense.pt2     stage two alone, where it is a function of tensors
DIR/signature.json            inputs and outputs
DIR/recorded.npz              inputs of some requests, and `expected`, their probabilities
DIR/README.md                 how to run it, made for this model
DIR/manifest.json             size and SHA-256 of all files; manifest.sha256 has its digest
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from embeddings.errors import SnapshotError
from trainer.config.toml import Settings
from trainer.portable.requests import Arrays
from trainer.portable.signature import Signature
from trainer.sealed_folder import DIGEST, MANIFEST, Seal, entry_of

SEAL = Seal(SnapshotError, "export it again")
SIGNATURE, RECORDED, README, EXPECTED = "signature.json", "recorded.npz", "README.md", "expected"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PortableFile(Settings):
    """Size and digest of one file, its path relative to the folder."""

    path: str = Field(pattern=r"^[a-zA-Z0-9_]+(/[a-z0-9_.]+)*(\.[a-z0-9]+)?$", max_length=200)
    bytes: int = Field(ge=0)
    sha256: _Sha256


class PortableManifest(Settings):
    """What a folder holds.

    Attributes:
        form: name of the format; model, dense: its files; dense is empty where there is none, and then
            `no_dense` says why.
        worst: largest difference of a probability that export found; aucs: task -> by the snapshot and by
            the runtime.
    """

    format: Literal["tandemrec.portable"] = "tandemrec.portable"
    version: Literal[1] = 1
    form: str
    model: str
    dense: str = ""
    no_dense: str = ""
    snapshot: _Sha256
    worst: float = Field(ge=0)
    aucs: dict[str, tuple[float, float]]
    files: tuple[PortableFile, ...]
    versions: dict[str, str]


def seal(folder: Path, manifest: PortableManifest) -> None:
    """List all files that are there, and seal the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = tuple(
        PortableFile(path=path.relative_to(folder).as_posix(), **entry_of(path))
        for path in files
        if path.name not in (MANIFEST, DIGEST)
    )
    SEAL.write(folder, manifest.model_copy(update={"files": entries}).model_dump_json(indent=1))


def read(folder: Path) -> tuple[PortableManifest, Signature]:
    """The manifest and the signature of a folder, once all its files are what was written.

    Raises:
        SnapshotError: it is no portable model, or it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise SnapshotError(folder, "no portable model here; run `tandemrec export --format onnx`")
    try:
        manifest = PortableManifest.model_validate_json(SEAL.read(folder))
        for entry in manifest.files:
            SEAL.check(folder / entry.path, entry.bytes, entry.sha256)
        signature = Signature.model_validate_json((folder / SIGNATURE).read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise SnapshotError(folder / MANIFEST, f"is no portable model: {where}: {problem['msg']}") from None
    return manifest, signature


def write_recorded(folder: Path, inputs: Arrays, expected: npt.NDArray[np.float32]) -> None:
    """Inputs, and probabilities [B, C, T]."""
    arrays: dict[str, Any] = {**inputs, EXPECTED: expected}
    np.savez(folder / RECORDED, **arrays)


def read_recorded(folder: Path, signature: Signature) -> tuple[Arrays, npt.NDArray[np.float32]]:
    """The same, inputs in the order of the signature."""
    with np.load(folder / RECORDED) as content:
        return {name: content[name] for name in signature.names}, content[EXPECTED]
