"""A bucket in a server of S3's protocol, in a process of its own, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.helpers.launching import ROOT

KEY, SECRET, TOKEN = "AKIDTANDEMREC0123456", "sEcReT+of/the0tests0tandemrec", "tOkEn0of0the0tests0tandemrec"


# Names that an answer of the server holds, so that whatever lists more has to ask again.
PAGE = 20


@dataclass
class Store:
    """A running server; `bucket` is the place of its bucket."""

    address: str
    name: str

    @property
    def bucket(self) -> Path:
        from trainer.storage import place

        return place(f"s3://{self.name}")

    def faults(self, *rules: tuple[str, str, str, int] | tuple[str, str, str, int, int]) -> None:
        """Have requests fail from now on: (method, path, kind, count, skip); without rules, none."""
        names = ("method", "path", "kind", "count", "skip")
        told = [dict(zip(names, (*rule, 0)[:5], strict=True)) for rule in rules]
        self._ask("faults", json.dumps(told).encode())

    def seen(self) -> list[list[Any]]:
        """What was asked for since the last call: [method, path and query, range, bytes answered]."""
        return list(self._ask("seen"))

    def objects(self) -> dict[str, bytes]:
        """All that lies in the bucket."""
        from trainer.storage.objects import sizes

        return {name: (self.bucket / name).read_bytes() for name in sizes(self.bucket)}

    def _ask(self, what: str, body: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{self.address}/-/{what}", body, timeout=20) as answer:
            return json.load(answer)


def few(monkeypatch: pytest.MonkeyPatch, attempts: int = 1) -> None:
    """Few attempts, for what fails again and again."""
    from trainer.storage import s3

    monkeypatch.setattr(s3, "ATTEMPTS", attempts)
    monkeypatch.setattr(s3.ObjectStore, "retries", 1)
    s3.ObjectStore.clear_instance_cache()


@contextmanager
def served(name: str = "tandem-tests") -> Iterator[Store]:
    """Start a server, and have this process and those that it starts use it."""
    from trainer.storage.s3 import ObjectStore

    command = [sys.executable, "-m", "tests.programs.object_store"]
    environ = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{int(process.stdout.readline())}"
        credentials = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": TOKEN,
            "AWS_ENDPOINT_URL": address,
            "AWS_REGION": "us-east-1",
            # The configuration of whoever runs the tests is none of theirs.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        # What is kept of another server would be used for this one.
        ObjectStore.clear_instance_cache()
        with mock.patch.dict(os.environ, credentials):
            urllib.request.urlopen(
                urllib.request.Request(f"{address}/{name}", method="PUT", data=b""), timeout=20
            ).close()
            yield Store(address, name)
    finally:
        ObjectStore.clear_instance_cache()
        process.kill()
        process.communicate()
