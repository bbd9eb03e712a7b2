"""A headless Chromium by the DevTools protocol over two pipes: no port, no driver, no library.

with Browser() as browser:
    page = browser.open(Path("report.html"), width=1280, height=900)
    page.click("#tab-trajectories")
    assert page.value("document.querySelectorAll('td').length") > 0
    assert page.errors == []
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

DEADLINE_S = 60.0
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
)


def find_browser() -> str | None:
    """Path of a Chromium on this machine; None where there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class BrowserError(RuntimeError):
    """The browser did not start, did not answer in time, or refused; or a script raised."""


class Browser:
    """A browser of its own, in a folder of its own; ended at the end of the ``with`` block."""

    def __init__(self) -> None:
        path = find_browser()
        if path is None:
            raise BrowserError(f"none of {', '.join(_NAMES)} is installed; apt has chromium")
        self._folder = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        # The protocol is spoken on descriptors 3 and 4.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", path, *_FLAGS, f"--user-data-dir={self._folder.name}"],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._number = b"", 0
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        os.close(self._to)  # it ends with the pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._from)
        self._folder.cleanup()

    def open(self, file: Path, *, width: int, height: int, fragment: str = "") -> "Page":
        """Open a file in a new page and wait until it has loaded."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        page = Page(self, attached["sessionId"])
        self.pages[attached["sessionId"]] = page
        page.prepare(width, height)
        page.go(file.resolve().as_uri() + fragment)
        return page

    def call(
        self, method: str, values: dict[str, Any] | None = None, session: str | None = None
    ) -> dict[str, Any]:
        """Ask for something and wait for the answer; raises BrowserError."""
        self._number += 1
        asked: dict[str, Any] = {"id": self._number, "method": method, "params": values or {}}
        if session:
            asked["sessionId"] = session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE_S
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer)

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                raise BrowserError(f"{method}: no answer in {DEADLINE_S:.0f} s")
            read = os.read(self._from, 1 << 20)
            if not read:
                raise BrowserError(f"{method}: the browser is gone")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        page = self.pages.get(event.get("sessionId", ""))
        if page is not None:
            page.note(event["method"], event["params"])


class Page:
    """One page. ``errors`` are what its console complained of, ``requests`` what it asked for."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.errors: list[str] = []
        self.requests: list[str] = []

    def prepare(self, width: int, height: int) -> None:
        """Set the window's size and listen."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        """Give the window a size, in pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def go(self, address: str) -> None:
        """Load an address and wait for it."""
        self._call("Page.navigate", {"url": address})
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, script: str) -> Any:
        """What a JavaScript expression gives, promises awaited; BrowserError where it throws."""
        asked = {"expression": script, "returnByValue": True, "awaitPromise": True}
        answer = self._call("Runtime.evaluate", asked)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            said = details.get("exception", {}).get("description", details.get("text"))
            raise BrowserError(f"{script}: {said}")
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true; BrowserError with it after the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.value(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise BrowserError(f"not true in {DEADLINE_S:.0f} s: {condition}")
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click the first element of a CSS selector."""
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def key(self, name: str) -> None:
        """Press and release a key: ``ArrowRight``, ``j``."""
        asked = {"key": name, **({"text": name} if len(name) == 1 else {})}
        self._call("Input.dispatchKeyEvent", {"type": "keyDown", **asked})
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", "key": name})

    def hover(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self._call("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})

    def colours(self, scheme: str) -> None:
        """What the reader prefers: ``light`` or ``dark``."""
        wish = [{"name": "prefers-color-scheme", "value": scheme}]
        self._call("Emulation.setEmulatedMedia", {"features": wish})

    def screenshot(self, file: Path, *, whole: bool = False) -> Path:
        """A PNG of what is seen, or of the ``whole`` page."""
        answer = self._call(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole}
        )
        file.write_bytes(base64.b64decode(answer["data"]))
        return file

    def note(self, method: str, values: dict[str, Any]) -> None:
        """Take an event of the browser down."""
        if method == "Runtime.exceptionThrown":
            details = values["exceptionDetails"]
            said = details.get("exception", {}).get("description", details.get("text"))
            self.errors.append(str(said))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning"):
            self.errors.append(str(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.errors.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"][:200])

    def _call(self, method: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._browser.call(method, values, self._session)
