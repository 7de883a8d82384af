"""How the package is built: imports run one way, outside libraries have one home, functions stay small."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import asgi_sessions

PACKAGE = Path(asgi_sessions.__file__).parent

# The floors of the house, from the top down. A module imports from lower floors and its own room: a folder or
# module of this name. "" is the package itself.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__", "testing"),  # what is run, and what authors of apps and stores test with
    ("",),  # what is public
    ("cli",),
    ("middleware",),  # the walk of a request
    ("options",),  # its arguments, checked
    ("request",),  # one request's life: its messages, its unit of work, our own answers
    ("stores",),  # what a store promises; memory, SQLite, Redis
    ("session",),  # what an app holds: the dict, the draft of its record
    ("record", "client"),  # the record and its bytes; cookies, fingerprints, headers
    ("observation",),  # events
    ("errors", "asgi", "backend", "keys"),
)

# The floors within `stores.redis`, likewise.
REDIS_FLOORS: tuple[tuple[str, ...], ...] = (
    ("",),  # what is public
    ("store", "lock"),
    ("event_loop",),  # builds the parts of one event loop, and closes them
    ("locking", "records"),  # who has a session's lock, who waits; records and a user's sessions
    ("commands",),  # what is asked of Redis: scripts, keys, headers
    ("connection",),  # pipelines, and the seam to redis-py's private parts
)

# The floors within `stores.sqlite`, likewise.
SQLITE_FLOORS: tuple[tuple[str, ...], ...] = (
    ("",),  # what is public
    ("store",),
    ("engine", "claims", "turns"),  # what a process has open; what a call asks for, and how it waits
    ("watch", "ends"),  # listens for other processes; tells them which sessions have ended
    ("writer", "reader"),  # the thread that writes; connections that read
    ("operations", "housekeeping"),  # a store's operations, each in one transaction
    ("locks",),  # the queue for a session's lock
    ("records",),  # records, their bounds and columns
    ("transaction", "columns"),
    ("waking", "gate", "schema", "queries", "urls"),  # processes, tables
    ("place",),  # the file
    ("faults",),  # errors in words
)

# Where an outside library may be named: in these modules and below them.
HOMES = {
    "itsdangerous": {"client.signer", "client.starlette"},
    "redis": {"stores.redis"},
    "hiredis": {"stores.redis"},
    "sqlite3": {"stores.sqlite"},
    "cryptography": {"record.vault"},
    "fcntl": {"stores.sqlite.gate"},
    "trio": {"stores.answers"},
    "pytest": {"testing"},
    "ua_parser": {"client.agent"},
    "pydantic": {"record", "session.draft", "options"},
    "pydantic_core": {"record", "session.draft"},
    "starlette": {"session.access"},
    "fastapi": set(),
    "httpx": set(),
}

LATE_IMPORTS = {
    ("client.agent", "_parsed"),  # ua-parser is an optional dependency
    ("record.vault", "__init__"),  # cryptography is an optional dependency
    ("stores.urls", "_made"),  # redis is an optional dependency
    ("stores.answers", "_home"),  # so is trio
    ("session.access", "session_dependency"),  # and Starlette
    ("", "__getattr__"),  # the same, and for whoever names a class that needs it
    ("testing", "__getattr__"),  # and pytest, which the tests for authors of stores are made of
}

LONG_FUNCTIONS = {
    "SessionMiddleware.__init__",  # one line for each argument
}


class Import(NamedTuple):
    """Who imports what, and in which function."""

    module: str
    target: str
    function: str | None


def name_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name_of(path) for path in PACKAGE.rglob("__init__.py")}


def targets_of(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """What an import names: modules of the package with a dot before them, others by their first name."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if not node.level:
        return [(node.module or "").partition(".")[0]]
    parts = module.split(".") if module else []
    base = parts[: len(parts) - node.level + (module in PACKAGES)]
    if node.module:
        return ["." + ".".join([*base, node.module])]
    return ["." + ".".join([*base, alias.name]) for alias in node.names]


def imports_of(module: str, tree: ast.AST, function: str | None = None) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for target in targets_of(module, node):
                yield Import(module, target, function)
            continue
        within = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from imports_of(module, node, within)


IMPORTS = [found for module, tree in MODULES.items() for found in imports_of(module, tree)]
OWN = [found._replace(target=found.target[1:]) for found in IMPORTS if found.target.startswith(".")]


def room_of(module: str, floors: tuple[tuple[str, ...], ...] = FLOORS) -> tuple[int, str]:
    """The floor of a module, 0 the highest, and its room there."""
    first = module.partition(".")[0]
    for floor, rooms in enumerate(floors):
        if first in rooms:
            return floor, first
    pytest.fail(f"the module {module!r} has no floor: say in FLOORS where it belongs")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    """A module knows the floors below it and its own room, never what lies above or beside it."""
    floor, room = room_of(module)
    for found in OWN:
        if found.module == module:
            below, other = room_of(found.target)
            assert below > floor or other == room, f"{module} imports {found.target}"


@pytest.mark.parametrize(("room", "floors"), {"redis": REDIS_FLOORS, "sqlite": SQLITE_FLOORS}.items())
def test_imports_of_a_store_run_one_way(room: str, floors: tuple[tuple[str, ...], ...]) -> None:
    """The same within the room of a store."""
    for found in OWN:
        module, target = (_within(f"stores.{room}", name) for name in (found.module, found.target))
        if module is not None and target is not None:
            (floor, own), (below, other) = room_of(module, floors), room_of(target, floors)
            assert below > floor or other == own, f"{found.module} imports {found.target}"


def _within(room: str, module: str) -> str | None:
    """The rest of a module's name; None where it lies elsewhere."""
    return module.partition(room)[2].lstrip(".") if f"{module}.".startswith(f"{room}.") else None


def test_readme_has_the_map() -> None:
    """The table under "Development" has the same rooms on the same floors."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
    table = re.search(r"^\| rooms, .*\n\|-.*\n((?:\|.*\n)+)", readme, re.MULTILINE)
    assert table is not None, "README has no table of the rooms"
    rows = [line.split("|")[1] for line in table[1].splitlines()]
    rooms = [re.findall(r"`(\w+)/?`", row.replace("`__init__`", "``")) or [""] for row in rows]
    assert [set(row) for row in rooms] == [set(floor) for floor in FLOORS]


def test_there_are_no_circles() -> None:
    """Not within a room either, and not for types: what calls back gets a protocol or a function."""
    graph: dict[str, set[str]] = {}
    for found in OWN:
        graph.setdefault(found.module, set()).add(found.target)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(("library", "homes"), HOMES.items())
def test_an_outside_library_has_one_home(library: str, homes: set[str]) -> None:
    """What would have to change with it is in one place."""
    users = {found.module for found in IMPORTS if found.target == library}
    strangers = {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in homes)}
    assert strangers == set()


def test_imports_stand_at_the_top() -> None:
    """But for those that keep redis optional."""
    late = {(found.module, found.function) for found in IMPORTS if found.function is not None}
    assert late <= LATE_IMPORTS


def test_memory_sessions_need_neither_redis_nor_a_framework() -> None:
    """Importing the package and making a middleware loads no optional library."""
    code = (
        "import sys, asgi_sessions as a\n"
        "a.SessionMiddleware(None, 'k' * 32)\n"
        "optional = {'redis', 'hiredis', 'starlette', 'fastapi', 'pytest', 'httpx', 'ua_parser'}\n"
        "print(sorted(optional & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- functions and names --------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, int]]:
    """Every function with the number of its lines, docstring included."""
    for tree in MODULES.values():
        holders: list[ast.Module | ast.ClassDef] = [tree]
        holders += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        for holder in holders:
            prefix = f"{holder.name}." if isinstance(holder, ast.ClassDef) else ""
            for node in holder.body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                    yield prefix + node.name, node.end_lineno - node.lineno + 1


def test_functions_are_small() -> None:
    """None over 40 lines but those named above, half of them under 10."""
    sizes = list(functions())
    assert {name for name, lines in sizes if lines > 40} == LONG_FUNCTIONS
    assert statistics.median(lines for _, lines in sizes) < 10


def test_no_module_is_a_drawer() -> None:
    """A name that says nothing collects what belongs elsewhere."""
    assert not {"utils", "util", "helpers", "common", "misc"} & {name.rpartition(".")[2] for name in MODULES}


@pytest.mark.parametrize("name", asgi_sessions.__all__)
def test_public_names_are_described(name: str) -> None:
    """Each has a docstring of its own, and so has every public member."""
    thing = getattr(asgi_sessions, name)
    assert (thing.__doc__ or "").strip()
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert (inspect.getdoc(getattr(thing, member)) or "").strip(), f"{name}.{member}"


def test_all_names_are_there_and_sorted() -> None:
    """`__all__` is complete and in the order in which a reader looks."""
    assert sorted(set(asgi_sessions.__all__)) == asgi_sessions.__all__
    assert asgi_sessions.__version__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = asgi_sessions.nothing
