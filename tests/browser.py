"""Headless Chromium, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
"""To wait for an answer, at the most: other work may share the machine."""


class Browser:
    """A page at a time, and what it complained of."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._rest, self._sent, self._session = b"", 0, None
        self._origin = "file:"
        self.complaints: list[Any] = []
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(
        self, page: Path | str, width: int = 1200, height: int = 900, dark: bool = False
    ) -> None:
        """Load a file or the page of a server; a width of a phone's means a phone."""
        self.complaints.clear()
        url = page if isinstance(page, str) else page.as_uri()
        self._origin = "/".join(url.split("/")[:3])
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._ask("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        self.scheme("dark" if dark else "light")
        self._ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")
        self.settle()

    def scheme(self, name: str) -> None:
        """Prefer a colour scheme, as a setting of the system would."""
        media = [{"name": "prefers-color-scheme", "value": name}]
        self._ask("Emulation.setEmulatedMedia", features=media)

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """A mouse event at a point of the window: mouseMoved, mousePressed, mouseWheel, ..."""
        self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.settle()

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        """A touch event: touchStart, touchMove, touchEnd."""
        fingers = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        self._ask("Input.dispatchTouchEvent", type=kind, touchPoints=fingers)
        self.settle()

    def drop(self, path: Path, x: float, y: float) -> None:
        """Drop a file at a point of the window."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self._ask("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
        self.settle()

    def download_to(self, folder: Path) -> None:
        """Save downloads there."""
        self._ask("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def key(self, name: str) -> None:
        """Press and release a key."""
        text = (
            {"text": "\r" if name == "Enter" else name} if len(name) == 1 or name == "Enter" else {}
        )
        self._ask("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", key=name)
        self.settle()

    def screenshot(self, path: Path, full: bool = True) -> None:
        """Save what is seen, or all of the page, as PNG."""
        data = self._ask("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._sent:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._back, 1 << 20)
            assert part, "the browser ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep an event that is a complaint, or a request that leaves the page."""
        about = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(about["exceptionDetails"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append([a.get("value") for a in about["args"]])
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        elif event.get("method") == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if not url.startswith((self._origin, "data:", "blob:")):
                self.complaints.append(url)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser; where CI is set, its absence is a failure."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program and not os.environ.get("CI"):
        pytest.skip("no chromium: apt-get install chromium")
    assert program, "no chromium: apt-get install chromium"
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()

    # Its processes may still write there after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            # Chromium reads file 3 and writes file 4.
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{to_read} 4>&{from_write}',
                "bash",
                program,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_read, from_write),
        )
        os.close(to_read)
        os.close(from_write)
        try:
            yield Browser(to_write, from_read)
        finally:
            os.close(to_write)
            os.close(from_read)
            process.terminate()
            process.wait()
