"""The demo for tests: as a module, and as a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SECRET = "a-secret-of-the-tests-and-of-nothing-else"


@contextmanager
def demo_module() -> Iterator[ModuleType]:
    """The module `examples/demo.py`, with its neighbours importable as when it is run as a script."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "demo", module)
        spec.loader.exec_module(module)
        yield module


class Running(NamedTuple):
    """The script as a process."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)


def start(*options: str) -> subprocess.Popen[str]:
    """The script with these options, its output as text."""
    command = [sys.executable, str(EXAMPLES / "demo.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(*options: str) -> tuple[int, str, str]:
    """The exit code, output and errors of the script where it ends by itself."""
    with start(*options) as process:
        output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


@contextmanager
def running_demo(*options: str, port: int = 0) -> Iterator[Running]:
    """The script while it runs; Ctrl-C must end it cleanly, whatever is under way."""
    with start("--port", str(port), *options) as process:
        try:
            yield Running(process, _port_told_by(process))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    for trouble in ("Traceback", "Warning", "timeout graceful shutdown exceeded"):
        assert trouble not in errors, errors


def _port_told_by(process: subprocess.Popen[str]) -> int:
    """The port in the address that the script prints once it listens."""
    assert process.stdout is not None
    for line in process.stdout:
        address = re.search(r"http://127\.0\.0\.1:(\d+)/account", line)
        if address is not None:
            return int(address[1])
    assert process.stderr is not None
    raise AssertionError(f"the script ended without telling its address: {process.stderr.read()}")


def events(text: str) -> Sequence[tuple[str, str]]:
    """The server-sent events of the chat, as kind and data."""
    found: list[tuple[str, str]] = re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)
    return found
