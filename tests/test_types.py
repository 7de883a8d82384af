"""What an app's author sees in an editor: types that are known, wrong uses refused, README's code."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asgi_sessions import SessionMiddleware

ROOT = Path(__file__).parents[1]

REFUSED = """\
get_session(connection, Shop).data.basket
get_session(connection).data.cart
get_session(connection, Shop).data.cart.append(1)
get_session(connection, dict)
get_session_data(connection, "Shop")
session_dependency(Request)
plain: Session[int]
shop: Session[Shop] = get_session(connection)
InMemorySessionStore(model=dict)
store: SessionStore[Shop] = InMemorySessionStore()
SessionMiddleware(app, "key", model=Item)
SessionMiddleware(app, "key", lock="never")
SessionMiddleware(app, "key", max_ages=3)
SessionMiddleware(app, "key", same_site="Lax")
get_session(connection).login(None)
get_session(connection).data.user_id + 1
"""
"""One wrong use a line."""

PREAMBLE = """\
from typing import Annotated, Any
import pytest
from fastapi import Depends, FastAPI, Request, WebSocket
from pydantic import BaseModel
from asgi_sessions import (
    InMemorySessionStore, Session, SessionData, SessionFilter, SessionMiddleware, SessionStore, get_session,
    get_session_data, session_dependency,
)

class Item(BaseModel):
    sku: str

class Shop(SessionData):
    cart: list[Item] = []

class MyStore(SessionStore):
    def __init__(self, backend: dict[str, bytes]) -> None: ...

ShopSession = Shop
app = FastAPI()
connection: Any = None
data = SessionData(session_id="a")
ids = ["a"]
key = secret_key = session_id = SECRET = OLD_SECRET = "a"
store: SessionStore = InMemorySessionStore()
"""
"""What the pieces of README take as given. Any other name that they lack is one that a reader misses."""


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def snippets() -> Iterator[tuple[int, str]]:
    """README's pieces of Python, with the line on which each begins."""
    readme = ROOT.joinpath("README.md").read_text("utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE):
        yield readme[: found.start(1)].count("\n") + 1, found[1]


def module_of(snippet: str) -> str:
    """A module that type checkers read: what is missing comes from the preamble, `await` gets a function."""
    tree = ast.parse(snippet)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {
        alias.asname or alias.name for node in ast.walk(tree) for alias in getattr(node, "names", ())
        if isinstance(alias, ast.alias)
    }  # fmt: skip
    made |= {node.name for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)} | {
        argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args
    }
    missing = {node.id for node in names} - made - set(dir(builtins))
    imports = "".join(f"from preamble import {name}\n" for name in sorted(missing))
    if any(isinstance(node, ast.Expr) and isinstance(node.value, ast.Await) for node in tree.body):
        lines = "".join(f"    {line}\n" for line in snippet.splitlines())
        snippet = f"async def snippet() -> None:\n{lines}"
    return f"from __future__ import annotations\n{imports}{snippet}"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder with all that is to be checked."""
    tmp_path.joinpath("preamble.py").write_text(PREAMBLE)
    tmp_path.joinpath("refused.py").write_text(f"from preamble import *\n{REFUSED}")
    for line, snippet in snippets():
        named = re.match(r"# (\w+\.py)\n", snippet)  # other pieces import it
        name = named[1] if named is not None else f"readme_line_{line}.py"
        tmp_path.joinpath(name).write_text(module_of(snippet))
    shutil.copy(ROOT / "tests" / "typed_uses.py", tmp_path)
    return tmp_path


def judge(errors: list[tuple[str, int, str]]) -> None:
    """Each wrong use is an error of its own line, and there are no others."""
    assert [error for error in errors if error[0] != "refused.py"] == []
    refused = {line for _, line, _ in errors}
    passed = [use for number, use in enumerate(REFUSED.splitlines(), 2) if number not in refused]
    assert passed == []


def test_mypy_knows_the_types(modules: Path) -> None:
    """`mypy --strict` passes what is right, every piece of README among it, and nothing that is wrong."""
    files = sorted(path.name for path in modules.glob("*.py"))
    cache = ROOT / ".mypy_cache" / "snippets"
    options = [
        "--strict",
        "--implicit-reexport",
        "--config-file=",
        f"--cache-dir={cache}",
        "--no-pretty",
        "--no-error-summary",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "--hide-error-context", *files],
        cwd=modules, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # there are errors, those that are wanted
    found = re.findall(r"^(.+?\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    judge([(Path(name).name, int(line), text) for name, line, text in found])


@pytest.mark.skipif(not shutil.which("pyright"), reason="comes with the extra `dev`")
def test_pyright_knows_the_types(modules: Path) -> None:
    """So does pyright, as it is set up in VS Code's Pylance by who looks at types."""
    config = {"extraPaths": [str(ROOT)], "pythonVersion": "3.10", "typeCheckingMode": "standard"}
    modules.joinpath("pyrightconfig.json").write_text(json.dumps(config))
    done = subprocess.run(
        ["pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(modules)],
        capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["generalDiagnostics"]
    judge(
        [
            (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"])
            for each in found
            if each["severity"] == "error"
        ]
    )


@pytest.mark.parametrize("name", list(inspect.signature(SessionMiddleware).parameters)[1:])
def test_the_docstring_has_each_option(name: str) -> None:
    """An editor shows it where the middleware is named."""
    assert f"\n{name}: " in (inspect.getdoc(SessionMiddleware) or "")
