"""A real Chromium without a window, driven by its own protocol, and a server for it to visit.

Tests that take the fixture `chromium` or `tab` are skipped where there is none, and fail there with
`--browser`, which CI sets.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from websockets.sync.client import ClientConnection, connect

from asgi_sessions.asgi import ASGIApp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW_TO_GET_IT = "no Chromium here: `apt-get install chromium`, or name the program in the variable CHROMIUM"
PATIENCE = 30.0  # seconds for a step of the browser, on a busy machine

_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # root has none, and the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP *.test 127.0.0.1",
)


def find_chromium() -> str | None:
    """The program, None where there is none."""
    names = [os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else NAMES
    return next(filter(None, map(shutil.which, names)), None)


class Chromium:
    """A browser process; every host under ``.test`` is this machine."""

    def __init__(self, program: str) -> None:
        self._exit = ExitStack()
        self._numbers = itertools.count(1)
        # the profile may still be written to while the process ends
        home = self._exit.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        command = [program, *_OPTIONS, f"--user-data-dir={home}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._exit.callback(self._end)
        self._connection: ClientConnection = self._exit.enter_context(
            connect(self._address(Path(home) / "DevToolsActivePort"), max_size=None)
        )

    def close(self) -> None:
        """End the process."""
        self._exit.close()

    @contextmanager
    def profile(self) -> Iterator[Tab]:
        """A tab in a profile of its own: without cookies, and forgotten afterwards."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        try:
            yield Tab(self, context)
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def call(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its answer; events are passed over."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        self._connection.send(json.dumps(message if session is None else {**message, "sessionId": session}))
        while True:
            answer = json.loads(self._connection.recv(timeout=PATIENCE))
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _address(self, file: Path) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            lines = file.read_text().splitlines() if file.exists() else []
            if len(lines) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            assert self._process.poll() is None, "Chromium has ended"
            time.sleep(0.02)
        raise AssertionError("Chromium did not open its port")

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Tab:
    """One tab of one profile, which has the focus whatever other tabs do."""

    def __init__(self, browser: Chromium, context: str) -> None:
        page = browser.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = browser.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._browser = browser
        self._context = context
        self._session: str = session["sessionId"]
        self._call("Emulation.setFocusEmulationEnabled", enabled=True)

    def another(self) -> Tab:
        """A second tab of the same profile, with the same cookies."""
        return Tab(self._browser, self._context)

    def open(self, url: str) -> str:
        """Go there by a link of no page, as from the address bar; the text of the page."""
        loaded = self._call("Page.navigate", url=url)
        assert "errorText" not in loaded, f"{url}: {loaded['errorText']}"
        return str(self.run(_WHEN_LOADED.replace("LOADER", json.dumps(url))))

    def run(self, script: str) -> object:
        """What a script of the page gives."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        value: object = answer["result"].get("value")
        return value

    def until(self, condition: str) -> None:
        """Wait until this expression of the page is true; it is named where it does not become so."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(condition):
            page = self.run("document.body.innerText")
            assert time.monotonic() < deadline, f"never came true: {condition}\non this page:\n{page}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """A key for what has the focus: Enter, Tab, or one that stands for itself."""
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Text for the field that has the focus."""
        self._call("Input.insertText", text=text)

    def screen(self, width: int, height: int, *, dark: bool = False) -> None:
        """A screen of this size, in CSS pixels, of somebody who likes it light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._call("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def cookies(self, name: str) -> list[tuple[str, str]]:
        """Domain and path of each cookie of this name; a domain that the server named begins with a dot."""
        found = self._browser.call("Storage.getCookies", browserContextId=self._context)["cookies"]
        return sorted((cookie["domain"], cookie["path"]) for cookie in found if cookie["name"] == name)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, session=self._session, **params)


_WHEN_LOADED = """
new Promise(done => {
    const look = () => location.href === LOADER && document.readyState === "complete"
        ? done(document.body.innerText) : setTimeout(look, 5);
    look();
})
"""


@contextmanager
def served(app: ASGIApp, **options: Any) -> Iterator[int]:
    """The app at a port of this machine, in a thread of its own; `options` are uvicorn's."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", **options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who comes before the server runs waits for it
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()
