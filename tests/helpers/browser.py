"""A headless Chromium, driven through a pipe with its own debugging protocol: no driver to install."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --remote-debugging-pipe --force-color-profile=srgb"
)


class Browser:
    """One page. Times are limits in seconds."""

    def __init__(self, give: int, take: int) -> None:
        self._give, self._take, self._read, self._number = give, take, b"", 0
        self.requested: list[str] = []
        self.errors: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._call(method, parameters, self._session)

    def open(self, url: str, width: int = 1400, height: int = 1000) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=url)

    def value(self, code: str) -> Any:
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:  # such as a page that is not there yet
            return None
        return found["result"].get("value")

    def wait(self, code: str, limit: float = 30) -> Any:
        """Until the code's value is true."""
        end = time.monotonic() + limit
        while not (found := self.value(code)):
            assert time.monotonic() < end, f"still not: {code}; {self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def screenshot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(
        self, method: str, parameters: dict[str, Any], session: str | None = None, limit: float = 60
    ) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._give, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit
        while True:
            answer = self._message(end, method)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Network.requestWillBeSent":
            self.requested.append(event["params"]["request"]["url"])
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(json.dumps(event["params"])[:300])

    def _message(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._take], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no answer to {method}"
            part = os.read(self._take, 1 << 20)
            assert part, "the browser is gone"
            self._read += part
        whole, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(whole)
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Started on an empty profile, ended with the body."""
    assert CHROMIUM is not None
    to_take, to_give = os.pipe()
    answers, back = os.pipe()

    process = subprocess.Popen(
        [
            # It reads commands from 3 and answers on 4.
            *("bash", "-c", f'exec "$@" 3<&{to_take} 4>&{back}', "bash", CHROMIUM),
            *(*_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(to_take, back),
    )
    os.close(to_take)
    os.close(back)
    try:
        yield Browser(to_give, answers)
    finally:
        process.kill()
        process.wait()
        os.close(to_give)
        os.close(answers)
