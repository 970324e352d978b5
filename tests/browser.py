"""A page in headless Chromium, asked over its debugging pipe: for tests of the report, and to look at it.

``python tests/browser.py PAGE PICTURE [WIDTH HEIGHT [light|dark [SELECTOR]]]`` writes a screenshot (PNG)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_WAIT = 60.0


def find_browser() -> str | None:
    """Path of Chromium, None where it isn't installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


NEEDS_BROWSER = pytest.mark.skipif(find_browser() is None, reason="Chromium is not installed (Debian: chromium)")
"""Mark of tests that need it."""


class Browser:
    """One page of a headless Chromium. ``errors``: what it wrote to its console as an error, uncaught exceptions.
    ``requests``: addresses that it asked for, but its own file and data."""

    def __init__(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        program = find_browser()
        assert program is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # its helpers may still write
        out_read, self._out = os.pipe()
        self._into, in_write = os.pipe()

        def at_three_and_four() -> None:
            os.dup2(out_read, 13)
            os.dup2(in_write, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        self._process = subprocess.Popen(
            [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={self._profile.name}"],
            preexec_fn=at_three_and_four, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(out_read)
        os.close(in_write)
        self._number, self._kept = 0, b""
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for room in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{room}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + _WAIT
        while not self._loaded and time.monotonic() < end:
            self._receive()
        self.evaluate("new Promise(done => setTimeout(done, 300))")  # charts are drawn after the page has loaded

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window, as of a phone below 500 pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)  # fmt: skip

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for. Raises RuntimeError if it throws."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def screenshot(self, picture: Path, selector: str | None = None, largest: int = 12000) -> None:
        """Write a PNG of the page from its top, at most ``largest`` pixels high, or of one element."""
        box = self.evaluate(f"""(() => {{ const e = document.querySelector({json.dumps(selector or "html")});
            const r = e.getBoundingClientRect();
            return {{x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}} }})()""")
        clip = {**box, "height": min(box["height"], largest), "scale": 1}
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        picture.write_bytes(base64.b64decode(data))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._receive()
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message; events are noted."""
        while b"\0" not in self._kept:
            read = os.read(self._into, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has ended")
            self._kept += read
        text, _, self._kept = self._kept.partition(b"\0")
        message = json.loads(text)
        method, told = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.errors.append(str([a.get("value", a.get("description")) for a in told["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.errors.append(told["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = told["request"]["url"]
            if not url.startswith(("file:", "data:", "about:", "blob:")):
                self.requests.append(url)
        elif method == "Page.loadEventFired":
            self._loaded = True
        return message

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.call("Browser.close")
        self._process.wait()
        os.close(self._out)
        os.close(self._into)
        self._profile.cleanup()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_page(page: Path) -> None:
    """Assert that a phone shows a page without error, request or scrolling sideways, and draws all its charts."""
    charts = page.read_text(encoding="utf-8").count("<div class=vega ")
    with Browser(page, 390, 800) as browser:
        assert browser.errors == [] and browser.requests == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.evaluate("document.querySelectorAll('.vega svg').length") == charts > 0


if __name__ == "__main__":
    source, target, *rest = sys.argv[1:]
    size = (int(rest[0]), int(rest[1])) if len(rest) > 1 else (1280, 900)
    with Browser(Path(source), *size, dark="dark" in rest[2:]) as shown:
        shown.screenshot(Path(target), next((word for word in rest[2:] if word not in ("light", "dark")), None))
        print(shown.errors, shown.requests)
