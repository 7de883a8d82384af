"""The security requirements: each has an id, where it comes from, and tests that carry its id.

`python tests/security/requirements.py` prints the table as markdown, with the tests of each line.

ASVS is the OWASP Application Security Verification Standard 5.0, by requirement or else by section; SMCS is
the OWASP Session Management Cheat Sheet, by heading.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest


class Requirement(NamedTuple):
    """One line of the table."""

    id: str
    source: str
    text: str


# fmt: off
REQUIREMENTS = tuple(Requirement(*line) for line in [
    # identifiers
    ("ID-1", "ASVS 7.2.3, V11.5",
     "An id is 128 bits of the system's generator: unique, after a fork too."),
    ("ID-2", "SMCS: Session ID Generation and Verification",
     "An id that a client chose is never adopted."),
    ("ID-3", "SMCS: Manage Session ID as Any Other User Input",
     "What has not exactly the form of an id never reaches the store, however well it is signed."),
    ("ID-4", "ASVS 14.2.1, 3.3.4",
     "An id comes from the cookie alone and leaves in `Set-Cookie` alone."),
    # signatures and keys
    ("SIG-1", "ASVS 7.2.1; CWE-347",
     "A signature has one spelling; no byte of a cookie can be another."),
    ("SIG-2", "ASVS V11.4",
     "Cookies are signed with HMAC-SHA-256; older and other algorithms, salts and key derivations are "
     "refused."),
    ("SIG-3", "ASVS V11.2",
     "Signatures and fingerprints are compared in constant time."),
    ("KEY-1", "RFC 2104 section 3; ASVS V11.2",
     "An empty key is refused and a short one warned of."),
    ("KEY-2", "ASVS V11.2",
     "Keys rotate: an old one verifies and is replaced, a removed one is dead."),
    # cookies
    ("COOKIE-1", "ASVS 3.3.1, 3.3.2, 3.3.4",
     "By default a cookie is HttpOnly, SameSite=Lax, for this host alone, and Secure on https and wss."),
    ("COOKIE-2", "ASVS 3.3.3; RFC 6265bis: cookie name prefixes",
     "`__Host-` and `__Secure-` names, SameSite=None and Partitioned keep their rules or the app does "
     "not start."),
    ("COOKIE-3", "ASVS 3.3.5; RFC 6265bis: storage model",
     "Name and value are at most 4096 bytes."),
    ("COOKIE-4", "RFC 6265 section 8.6 (weak integrity)",
     "Of two live sessions neither counts, nor does any where more cookies come than are looked at; dead "
     "ones and what is not signed do not matter."),
    ("COOKIE-5", "CWE-113",
     "No setting can put a line break or an attribute into `Set-Cookie`."),
    ("COOKIE-6", "ASVS 14.3.3",
     "A cookie says nothing about the session but its id."),
    # fixation
    ("FIX-1", "ASVS 7.2.4; SMCS: Renew the Session ID After Any Privilege Level Change",
     "A login gives a new id and the old one is dead at once, for who planted it too."),
    ("FIX-2", "CWE-384",
     "A late answer to the old id never overwrites the new cookie."),
    ("FIX-3", "ASVS 15.4.2",
     "Logins that race from one session end as sessions of their own."),
    # the end of a session
    ("TIME-1", "ASVS 7.3.1",
     "The store ends a session that saw no request for `idle_timeout`."),
    ("TIME-2", "ASVS 7.3.2",
     "The store ends a session `max_age` after it began or signed in, whatever else was done with it."),
    ("END-1", "ASVS 7.4.1",
     "After a logout the cookie is worth nothing, and nothing brings the record back."),
    ("END-2", "ASVS 7.4.1, 15.4.2",
     "A session that is ended while a request holds it stays ended."),
    ("END-3", "ASVS 7.4.2, 7.4.3, 7.4.5, 7.5.2",
     "The sessions of a user can be listed and ended, all or all but this one."),
    # records
    ("DATA-1", "ASVS 1.5.2; CWE-502",
     "Records are JSON: nothing that is loaded can run code."),
    ("DATA-2", "ASVS 15.2.2; CWE-770",
     "A record is bounded in size and depth."),
    ("DATA-3", "ASVS 16.5.3",
     "A value that would not read back is refused and the old record kept."),
    ("DATA-4", "ASVS 16.5.3; CWE-345",
     "What lies in the store and is not this session's record is not used."),
    # resources
    ("DOS-1", "ASVS 15.2.2",
     "Without a session of theirs, clients cause no call of the store."),
    ("DOS-2", "ASVS 15.4.4",
     "Who floods one session gets 503; all other sessions are served."),
    ("DOS-3", "ASVS 15.2.2",
     "Dead ids leave nothing in the store, and memory is bounded."),
    ("DOS-4", "CWE-407 (the class of CVE-2024-7592)",
     "Hostile headers cost linear time, absurd ones nothing."),
    # clients
    ("CLIENT-1", "SMCS: Binding the Session ID to Other User Properties",
     "Another client with the cookie gets a fresh session and cannot touch the record."),
    ("CLIENT-2", "ASVS 4.1.3, 15.3.4",
     "Only trusted proxies say who the client is; what it wrote itself never counts."),
    ("WS-1", "ASVS 4.4.2",
     "With `allowed_origins` no other origin opens a WebSocket."),
    ("WS-2", "ASVS 4.4.3",
     "A WebSocket's cookie and client are checked like those of a request."),
    # answers and logs
    ("CACHE-1", "ASVS V14.3; SMCS: Web Content Caching",
     "What depends on the session says so, and an answer with a cookie is not stored by caches for many."),
    ("ERR-1", "ASVS 16.5.1",
     "The middleware's own answers say nothing about the cause."),
    ("ERR-2", "ASVS 16.5.2, 16.5.3",
     "With the store down nothing is acknowledged; what needs no session works."),
    ("ERR-3", "SMCS: Session ID Guessing and Brute Force Detection; CWE-204",
     "Absent, forged, unknown, expired and foreign sessions are answered alike."),
    ("LOG-1", "ASVS 16.2.5",
     "Logs, events and errors carry a salted short hash: never an id, a cookie, a key or a password."),
    ("LOG-2", "ASVS 16.4.1; CWE-117",
     "Nothing that a client sends can break a log line or pose as one."),
    ("LOG-3", "CWE-779",
     "An attack cannot fill the log."),
    ("LOG-4", "ASVS 16.3.3",
     "Each attempt to get around a check is told in an event."),
])
# fmt: on

_KNOWN = {line.id for line in REQUIREMENTS}


def requirement(*ids: str) -> pytest.MarkDecorator:
    """Marks a test as one of these requirements; `ValueError` for an id that is not in the table."""
    unknown = set(ids) - _KNOWN
    if unknown or not ids:
        raise ValueError(
            f"the table of requirements has no {', '.join(sorted(unknown)) or 'requirement here'}"
        )
    return pytest.mark.requirement(*ids)


def carriers() -> dict[str, list[str]]:
    """The tests of each requirement, as `module::test`; ids that no test carries are absent."""
    found: dict[str, list[str]] = {}
    for module, test, ids in _marked():
        for name in ids:
            found.setdefault(name, []).append(f"{module}::{test}")
    return found


def _marked() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"{__package__ or 'security'}.{path.stem}")
        for name, value in vars(module).items():
            for mark in getattr(value, "pytestmark", ()) if name.startswith("test_") else ():
                if mark.name == "requirement":
                    yield path.stem, name, mark.args


def render() -> str:
    """The table as markdown."""
    tests = carriers()
    lines = ["| id | requirement | source | tests |", "|---|---|---|---|"]
    for line in REQUIREMENTS:
        modules = sorted({test.partition("::")[0] for test in tests[line.id]})
        where = ", ".join(f"`{module}` ({_count(tests[line.id], module)})" for module in modules)
        lines.append(f"| {line.id} | {line.text} | {line.source} | {where} |")
    return "\n".join(lines)


def _count(tests: list[str], module: str) -> int:
    return sum(test.startswith(f"{module}::") for test in tests)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    sys.path.insert(0, str(Path(__file__).parents[2]))
    print(render())
