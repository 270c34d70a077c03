"""A headless Chromium to look at pages with, driven through its debugging pipe."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120  # seconds after which it hangs


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser that has no window. A context manager.

    Attributes:
        complaints: console messages that are warnings or worse, and exceptions, since `open`.
        requests: addresses asked for since `open`, data addresses left out.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        to_browser, self._input = os.pipe()
        self._output, from_browser = os.pipe()
        self._process = subprocess.Popen(
            [
                find_browser() or NAMES[0],
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--autoplay-policy=no-user-gesture-required",
                f"--user-data-dir={folder}",
                "--remote-debugging-pipe",
                "--no-startup-window",
                *options,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: _as_3_and_4(to_browser, from_browser),
            close_fds=False,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._received = b""
        self._sent = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        workers = {"autoAttach": True, "waitForDebuggerOnStart": False, "flatten": True}
        self.call("Target.setAutoAttach", **workers)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._input)
        os.close(self._output)

    def open(
        self, page: Path | str, width: int = 1280, height: int = 900, *, dark: bool = False
    ) -> None:
        """Show a file or an address and wait until it is loaded, with its pictures."""
        self.resize(width, height)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self._loaded = False
        self.complaints.clear()
        self.requests.clear()
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self._wait(lambda: self._loaded)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def wait_for(self, expression: str) -> None:
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"never: {expression}"
            time.sleep(0.1)

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Choose files, as in the dialogue of an input."""
        answer = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        files = [str(path) for path in paths]
        self.call("DOM.setFileInputFiles", files=files, objectId=answer["result"]["objectId"])

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        code = {" ": "Space"}.get(key, key)
        number = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}.get(key, ord(key[0].upper()))
        facts = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        typed = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression of JavaScript, awaited where it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, target: Path, *, whole: bool = True) -> None:
        """A PNG of the page, or of what is in view."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        target.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        answers: dict[int, Any] = {}
        number = self._send(method, parameters, self._session)
        self._wait(lambda: number in answers, answers)
        answer = answers[number]
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _send(self, method: str, parameters: dict[str, Any], session: str | None) -> int:
        """Send a command; its number."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._input, data) :]
        return self._sent

    def _wait(self, done: Callable[[], bool], answers: dict[int, Any] | None = None) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            ready = select.select([self._output], [], [], max(0, end - time.monotonic()))[0]
            data = os.read(self._output, 1 << 20) if ready else b""
            assert data, "the browser ended" if ready else "the browser hangs"
            *messages, self._received = (self._received + data).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message and answers is not None:
                    answers[message["id"]] = message
                else:
                    self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str | None, details: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Target.attachedToTarget" and self._session:  # a worker of the page
            self._send("Runtime.enable", {}, details["sessionId"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(details["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and details["type"] in ("warning", "error"):
            self.complaints.append(json.dumps(details["args"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] in ("warning", "error"):
            self.complaints.append(details["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = details["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)


def _as_3_and_4(*pipes: int) -> None:
    """Where the browser reads its commands, and where it answers."""
    copies = [fcntl.fcntl(pipe, fcntl.F_DUPFD_CLOEXEC, 5) for pipe in pipes]  # off 3 and 4
    for copy, place in zip(copies, (3, 4)):
        os.dup2(copy, place)
