"""A headless Chromium, driven through the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
TIMEOUT_S = 180.0  # far more than anything takes on a busy machine
POLL_S = 0.1
# The DevTools protocol uses the file descriptors 3 and 4 of the browser.
START = 'exec "$@" 3<&"$COMMANDS" 4>&"$ANSWERS"'


class Browser:
    """Context manager of one browser process with a profile of its own."""

    def __enter__(self) -> Browser:
        program = next(filter(None, map(shutil.which, NAMES)), None)
        assert program, f"no browser: tests/launchers/demo/install.sh installs one of {NAMES}"
        self._profile = tempfile.mkdtemp(prefix="browser-")
        command_end, self._commands = os.pipe()
        self._answers, answer_end = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += ["--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
        options += ["--no-first-run", f"--user-data-dir={self._profile}", "about:blank"]
        env = os.environ | {"COMMANDS": str(command_end), "ANSWERS": str(answer_end)}
        self._process = subprocess.Popen(
            ["bash", "-c", START, "browser", program, *options],
            env=env,
            pass_fds=(command_end, answer_end),
            stderr=subprocess.DEVNULL,
        )
        os.close(command_end)
        os.close(answer_end)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._pages: dict[str, Tab] = {}
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        shutil.rmtree(self._profile, ignore_errors=True)

    def new_user(self, address: str) -> Tab:
        """A tab with cookies and storage of its own, which has loaded `address`."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = Tab(self, session["sessionId"])
        self._pages[session["sessionId"]] = tab
        for domain in ("Page", "Network", "Runtime"):
            tab.call(f"{domain}.enable")
        tab.call("Page.navigate", url=address)
        return tab

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._waiting[number] = answers
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        answer = answers.get(timeout=TIMEOUT_S)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> None:
        """Hands out answers to those who wait, and events to their tabs."""
        with os.fdopen(self._answers, "rb") as stream:
            rest = b""
            while data := stream.read1():
                *messages, rest = (rest + data).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._waiting.pop(message["id"]).put(message)
                    elif message.get("sessionId") in self._pages:
                        self._pages[message["sessionId"]].events.append(message)


class Tab:
    """One page. `events` are those of the protocol's domains Page, Network and Runtime."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command to this page."""
        return self.browser.call(method, self.session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression. Awaits promises."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = TIMEOUT_S) -> Any:
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            value = self.evaluate(expression)
            if value:
                return value
            time.sleep(POLL_S)
        raise AssertionError(f"{expression} is not true; the page shows: {self.text()}")

    def text(self, selector: str = "body") -> str:
        """Visible text of an element; empty if there is none."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def wait_for_text(self, selector: str, text: str) -> None:
        """Waits until an element shows a text."""
        shown = f"(document.querySelector({json.dumps(selector)})?.innerText ?? '')"
        self.wait_for(f"{shown}.includes({json.dumps(text)})")

    def click(self, selector: str) -> None:
        """Clicks the middle of an element with the mouse, once the element has stopped moving."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait_for(f"{found} !== null")
        middle = (
            f"(() => {{ const e = {found}; e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        before = None
        while before != (now := self.evaluate(middle)):
            before = now
            time.sleep(POLL_S)
        x, y = now
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Replaces the text of an input as if it were typed or pasted."""
        self.click(selector)
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def upload(self, selector: str, path: Path) -> None:
        """Chooses a file for an input of files."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        assert node, f"no {selector}"
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def reload(self) -> None:
        """Reloads the page, and waits until that is done."""
        before = len(self.events)
        self.call("Page.reload")
        end = time.monotonic() + TIMEOUT_S
        while "Page.loadEventFired" not in [event["method"] for event in self.events[before:]]:
            assert time.monotonic() < end, "the page has not been loaded again"
            time.sleep(POLL_S)

    def screenshot(self, path: Path) -> None:
        """Writes a picture of the page, to look at when a test fails."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    @property
    def hosts(self) -> set[str]:
        """Hosts and ports that the page has asked for anything."""
        found = set()
        for event in self.events:
            if event["method"] == "Network.requestWillBeSent":
                found.add(urlsplit(event["params"]["request"]["url"]).netloc)
        return found - {""}
