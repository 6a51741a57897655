"""A real Chromium without a window, driven over its DevTools protocol: as much of it as the console's tests need.

Nothing is downloaded: a Chromium or Chrome on PATH is used (`apt-get install chromium`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
)
STARTS_WITHIN_S = 60.0
WITHIN_S = 30.0
"""Of what a page does by itself: generous, because the machine may be busy."""
POLL_S = 0.05
CTRL = 2
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowDown": (40, ""),
    "ArrowUp": (38, ""),
    "Home": (36, ""),
    "End": (35, ""),
    "/": (191, "/"),
}


def find_chromium() -> str | None:
    """Path of a Chromium; None: none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        """Exceptions of scripts, and errors in the console: violated policies among them."""
        self.addresses: list[str] = []
        """What was requested."""

    async def read(self) -> None:
        """Read what the browser sends, until the tab is closed."""
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Runtime.exceptionThrown":
                details = event["params"]["exceptionDetails"]
                self.problems.append(str(details.get("exception", {}).get("description", details["text"])))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                self.problems.append(str(event["params"]["entry"]["text"]))
            elif event["method"] == "Network.requestWillBeSent":
                self.addresses.append(str(event["params"]["request"]["url"]))

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await self._answers[number]
        assert "error" not in answer, (method, answer)
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, address: str) -> None:
        """Go to an address."""
        await self.send("Page.navigate", url=address)

    async def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        found = await self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    async def until(self, expression: str) -> Any:
        """The value of an expression, once it is true."""
        end_s = time.monotonic() + WITHIN_S
        # An element has no value outside its page.
        wanted = f"(found => found instanceof Node ? true : found)({expression})"
        while not (value := await self.value(wanted)):
            seen = "document.body.innerText.slice(0, 2000)"
            assert time.monotonic() < end_s, (expression, await self.value(seen), self.problems)
            await asyncio.sleep(POLL_S)
        return value

    async def text(self, selector: str) -> str:
        """The text of the first element that a selector finds."""
        return str(await self.value(f"document.querySelector({selector!r})?.textContent ?? ''"))

    async def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        code, text = KEYS[key]
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        typed = {"text": text} if text else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **common, **typed)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    async def type(self, text: str) -> None:
        """Type a text into the element that has the focus."""
        await self.send("Input.insertText", text=text)

    async def prefer(self, scheme: str) -> None:
        """Set the user's preference: "light" or "dark"."""
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def size(self, width: int, height: int) -> None:
        """Set the size of the view, in pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def picture(self, file: Path) -> None:
        """Write what is seen as a PNG."""
        found = await self.send("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(found["data"]))


class Chromium:
    """A running browser."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session = session
        self._base = base

    @asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A new tab, closed at the end."""
        async with self._session.put(f"{self._base}/json/new?about:blank") as response:
            target = await response.json(content_type=None)
        async with self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            page = Page(socket)
            reading = asyncio.create_task(page.read())
            try:
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.send(f"{domain}.enable")
                yield page
            finally:
                reading.cancel()
                await asyncio.wait({reading})
        async with self._session.get(f"{self._base}/json/close/{target['id']}"):
            pass


@asynccontextmanager
async def chromium(binary: str, profile: Path) -> AsyncIterator[Chromium]:
    """A browser with a new profile in that directory."""
    # Root has no user namespace to build the sandbox of; the pages are our own.
    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
    process = await asyncio.create_subprocess_exec(
        binary, *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        port = await _port(process, profile / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            yield Chromium(session, f"http://127.0.0.1:{port}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _port(process: asyncio.subprocess.Process, file: Path) -> int:
    end_s = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < end_s:
        assert process.returncode is None, f"the browser ended with status {process.returncode}"
        if file.exists() and (lines := file.read_text().split()):
            return int(lines[0])
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"the browser did not listen within {STARTS_WITHIN_S:g} s")
