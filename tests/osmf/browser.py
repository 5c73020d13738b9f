"""A headless Chromium that opens a page and says what it found, over the DevTools pipe.

findings = open_in_browser(Path("out/demo/report.html"))
assert findings.problems() == []
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Chromium speaks DevTools on descriptors 3 and 4 (messages end with NUL): nothing listens on a port.
_LAUNCHER = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(reads, 3), os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

_SETTLE = """
(async () => {
  const seen = Array.from(document.images).filter((picture) => picture.checkVisibility());
  for (const picture of seen) picture.loading = "eager";
  await Promise.all(seen.map((picture) => picture.decode().catch(() => null)));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  return document.documentElement.scrollHeight;
})()
"""

_LOOK = """
(async () => {
  for (const item of document.querySelectorAll("details")) item.open = true;
  const pictures = Array.from(document.images);
  for (const picture of pictures) picture.loading = "eager";
  await Promise.all(pictures.map((picture) => picture.decode().catch(() => null)));
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const charts = Array.from(document.querySelectorAll("svg.chart"));
  const size = (node) => node.getBoundingClientRect();
  return {
    title: document.title,
    n_pictures: pictures.length,
    broken_pictures: pictures.filter((p) => !(p.naturalWidth > 0)).map((p) => p.alt || p.src.slice(0, 60)),
    n_charts: charts.length,
    empty_charts: charts
      .filter((c) => !(size(c).width > 0 && size(c).height > 0) || !c.querySelector("path, rect, circle, text"))
      .map((c) => c.getAttribute("aria-label") || c.querySelector("title")?.textContent || "?"),
    page_width_px: document.documentElement.scrollWidth,
    window_width_px: document.documentElement.clientWidth,
  };
})()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrowserFindings:
    """What a browser found on a page, all its foldable parts opened."""

    title: str
    n_pictures: int
    broken_pictures: tuple[str, ...]
    n_charts: int
    empty_charts: tuple[str, ...]
    console_errors: tuple[str, ...]
    requests: tuple[str, ...]
    page_width_px: int
    window_width_px: int
    answer: Any = None

    def problems(self) -> list[str]:
        """Return what is wrong: broken pictures, empty charts, console errors, requests, a sideways scroll."""
        found = [f"broken picture: {alt}" for alt in self.broken_pictures]
        found += [f"empty chart: {name}" for name in self.empty_charts]
        found += [f"console: {line}" for line in self.console_errors]
        found += [f"the page fetched {address}" for address in self.requests]
        if self.page_width_px > self.window_width_px:
            found.append(f"the page is {self.page_width_px} px wide in a window of {self.window_width_px} px")
        return found


def find_chromium() -> str:
    """Return the path of Chromium; without it a test is skipped, or fails where CI=true."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    reason = f"none of {', '.join(NAMES)} is in PATH: run `apt-get install chromium`"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def open_in_browser(
    path: Path,
    *,
    width_px: int = 1280,
    height_px: int = 900,
    dark: bool = False,
    screenshot: Path | None = None,
    full_page: bool = True,
    ask: str | None = None,
    timeout_s: float = 60.0,
) -> BrowserFindings:
    """Open a local page and return what was found.

    ``screenshot`` is where a PNG goes, of the page before anything is unfolded; ``ask`` is a JavaScript
    expression whose value becomes ``answer``. TimeoutError when the browser takes longer than ``timeout_s``.
    """
    with _chromium(find_chromium(), timeout_s) as browser:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        page = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.call(f"{domain}.enable", page)
        metrics = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": False}
        browser.call("Emulation.setDeviceMetricsOverride", page, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.call("Emulation.setEmulatedMedia", page, features=[scheme])
        opened = browser.call("Page.navigate", page, url=path.resolve().as_uri())
        if "errorText" in opened:
            raise FileNotFoundError(f"{path} does not open: {opened['errorText']}")
        browser.wait_for("Page.loadEventFired")
        if screenshot is not None:
            page_height_px = browser.evaluate(page, _SETTLE)
            shown_px = page_height_px if full_page else height_px
            metrics["height"] = shown_px  # What was never in the window is not painted.
            browser.call("Emulation.setDeviceMetricsOverride", page, **metrics)
            browser.evaluate(page, _SETTLE)
            clip = {"x": 0, "y": 0, "width": width_px, "height": shown_px, "scale": 1}
            taken = browser.call("Page.captureScreenshot", page, captureBeyondViewport=True, clip=clip)
            screenshot.write_bytes(base64.b64decode(taken["data"]))
        answer = None if ask is None else browser.evaluate(page, ask)
        look = browser.evaluate(page, _LOOK)
        return BrowserFindings(
            title=look["title"],
            n_pictures=look["n_pictures"],
            broken_pictures=tuple(look["broken_pictures"]),
            n_charts=look["n_charts"],
            empty_charts=tuple(look["empty_charts"]),
            console_errors=tuple(browser.console_errors()),
            requests=tuple(browser.requests()),
            page_width_px=look["page_width_px"],
            window_width_px=look["window_width_px"],
            answer=answer,
        )


class _Browser:
    """A DevTools session over two pipes."""

    def __init__(self, reads: int, writes: int, timeout_s: float) -> None:
        self._reads = reads
        self._writes = writes
        self._deadline_s = time.monotonic() + timeout_s
        self._buffer = b""
        self._next_id = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, /, **params: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result."""
        self._next_id += 1
        message: dict[str, Any] = {"id": self._next_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(method)
            if answer.get("id") == self._next_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def evaluate(self, page: str, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited."""
        done = self.call("Runtime.evaluate", page, expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(f"the page threw: {done['exceptionDetails']}")
        return done["result"].get("value")

    def wait_for(self, event: str) -> None:
        """Wait until an event has come."""
        while all(seen["method"] != event for seen in self.events):
            self._receive(event)

    def console_errors(self) -> Iterator[str]:
        """Yield errors and warnings of the console, uncaught exceptions and refused policies."""
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                yield details.get("exception", {}).get("description") or details["text"]
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                yield " ".join(str(a.get("value", a.get("description", ""))) for a in params["args"])
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                yield params["entry"]["text"]

    def requests(self) -> Iterator[str]:
        """Yield the addresses that the page asked for, its own file and data URIs left out."""
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent" and event["params"].get("type") != "Document":
                address = event["params"]["request"]["url"]
                if not address.startswith("data:"):
                    yield address

    def _receive(self, waiting_for: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._reads], [], [], left_s)[0]:
                raise TimeoutError(f"Chromium did not answer in time; waiting for {waiting_for}")
            read = os.read(self._reads, 1 << 20)
            if not read:
                raise ConnectionError(f"Chromium ended; waiting for {waiting_for}")
            self._buffer += read
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def _chromium(path: str, timeout_s: float) -> Iterator[_Browser]:
    theirs_reads, ours_writes = os.pipe()
    ours_reads, theirs_writes = os.pipe()
    with tempfile.TemporaryDirectory(prefix="osmf-browser-", ignore_cleanup_errors=True) as profile:
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        launch = [sys.executable, "-c", _LAUNCHER, str(theirs_reads), str(theirs_writes), path, *flags]
        with (Path(profile) / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                launch,
                pass_fds=(theirs_reads, theirs_writes),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        os.close(theirs_reads)
        os.close(theirs_writes)
        try:
            browser = _Browser(ours_reads, ours_writes, timeout_s)
            yield browser
            browser.call("Browser.close")
        finally:
            os.close(ours_reads)
            os.close(ours_writes)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
