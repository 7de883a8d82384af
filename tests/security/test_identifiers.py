"""Ids: how they are made, and that a client has no say in them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from asgi import KEY, Answer, Clock, Site, messages, page, start, stream
from itsdangerous import TimestampSigner
from redis import Redis

from asgi_sessions import InMemorySessionStore, SessionStore
from asgi_sessions.client.signer import SALT, CookieSigner
from security.requirements import requirement
from security.service import Service, Visitor, login, logout, read, write

pytestmark = pytest.mark.anyio

TESTS = Path(__file__).parents[1]

# Parent and children begin with the same state of `random`, and make 300 ids each.
FORK = """
import json, os, random, anyio
from asgi import Site, page

async def ids(count):
    site = Site()
    for _ in range(count):
        await site.request(page(lambda session: session.update(n=1)))
    return [record.session_id for record in site.records()]

found = anyio.run(ids, 5)
for _ in range(3):
    ours, theirs = os.pipe()
    if os.fork() == 0:
        random.seed(1)
        with open(theirs, "w") as pipe:
            json.dump(anyio.run(ids, 300), pipe)
        os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        found += json.load(pipe)
random.seed(1)
print(json.dumps(found + anyio.run(ids, 300)))
"""


@requirement("ID-1")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no other system copies a process")
def test_forked_processes_never_make_the_same_id() -> None:
    """A child has its parent's memory and the state of its generators, and still other ids."""
    found = _said_by(FORK)
    assert len(found) == 1205
    assert len(set(found)) == len(found), "two processes made the same id"


def _said_by(program: str) -> list[str]:
    """What a process of its own prints."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: list[str] = json.loads(done.stdout)
    return said


TOKENS = """
import json, os
from asgi_sessions.stores.tokens import new_token

found = [new_token().decode() for _ in range(5)]
ours, theirs = os.pipe()
if os.fork() == 0:
    with open(theirs, "w") as pipe:
        json.dump([new_token().decode() for _ in range(200)], pipe)
    os._exit(0)
os.close(theirs)
with open(ours) as pipe:
    found += json.load(pipe)
print(json.dumps(found + [new_token().decode() for _ in range(200)]))
"""


@requirement("ID-1")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no other system copies a process")
def test_forked_processes_never_use_the_same_token() -> None:
    """Names of leases are made several at a time; a child does not go on with its parent's."""
    assert len(set(_said_by(TOKENS))) == 405


@requirement("ID-1")
async def test_every_bit_of_an_id_is_random() -> None:
    """128 bits, each set in half of the ids: a version number or a time would show."""
    store = InMemorySessionStore()
    service = Service(store)
    for _ in range(1000):
        await service.visitor().open(write)
    ids = await store.list_active()
    assert {len(session_id) for session_id in ids} == {32}
    numbers = [int(session_id, 16) for session_id in ids]
    counts = [sum(number >> bit & 1 for number in numbers) for bit in range(128)]
    assert min(counts) > 390, "a bit is hardly ever set"
    assert max(counts) < 610, "a bit is nearly always set"


def signed(session_id: str, key: str = KEY) -> str:
    """A cookie value as only the server can make it."""
    return CookieSigner(key).sign(session_id)


@requirement("ID-2")
@pytest.mark.parametrize("act", [write, login, read])
async def test_a_signed_id_without_a_record_is_not_adopted(service: Service, act: Any) -> None:
    """An id from a leaked log, or from before the store was emptied, names no new session."""
    chosen = "c0ffee00" * 4
    visitor = service.visitor(token=signed(chosen))
    await visitor.open(act)
    assert not await service.store.exists(chosen)
    if act is not read:
        assert visitor.session_id != chosen
        assert await service.store.exists(visitor.session_id)


@requirement("ID-2")
async def test_an_ended_id_is_not_adopted(service: Service) -> None:
    """The cookie of a session that was logged out begins no session under the same id."""
    visitor = service.visitor()
    ended = await visitor.begin()
    replay = visitor.copy()
    await visitor.open(logout)
    await replay.open(write)
    assert not await service.store.exists(ended)
    assert replay.session_id != ended


HOSTILE_IDS = [
    "", "*", "?" * 32, "0" * 31, "0" * 33, "0" * 255, "0" * 4000, "A" * 32, "0" * 31 + "G", "../" * 10,
    "0" * 32 + ":lock", "0" * 32 + "}", "{" + "0" * 30 + "}", "0" * 31 + "\n", "0" * 32 + "\r\nDEL x\r\n",
    "0" * 32 + "\x00", " " + "0" * 32, "'" + "0" * 31, "0" * 31 + "\xb2", "\uff10" * 32, "user:ada", "DROP",
]  # fmt: skip


def signed_by_hand(session_id: str) -> bytes:
    """What the package's own signer refuses to sign."""
    signer = TimestampSigner(KEY, salt=SALT, key_derivation="hmac", digest_method=hashlib.sha256)
    return bytes(signer.sign(session_id.encode()))


@requirement("ID-3")
@pytest.mark.parametrize("hostile", HOSTILE_IDS)
async def test_a_hostile_id_does_not_reach_the_store(hostile: str) -> None:
    """Even signed with the right key: the app sees a fresh session and no call is made."""
    site = Site()
    answer = await site.request(page(read), headers=[(b"cookie", b"session=" + signed_by_hand(hostile))])
    assert answer.status == 200
    assert site.log == ["app", "start 200", "body"], "the store was asked"


@requirement("ID-3")
async def test_hostile_ids_do_not_reach_redis(redis_url: str, redis: Redis) -> None:
    """By the server's own count of commands."""
    service = Service.on(redis_url)
    redis.config_resetstat()
    for hostile in HOSTILE_IDS:
        await service.request(page(read), [(b"cookie", b"session=" + signed_by_hand(hostile))])
    stats = redis.info("commandstats")
    assert set(stats) <= {"cmdstat_config", "cmdstat_info", "cmdstat_config|resetstat"}
    await service.store.aclose()


@requirement("ID-4")
@pytest.mark.parametrize(
    "scope",
    [
        {"query_string": b"session=TOKEN&session_id=TOKEN&PHPSESSID=TOKEN"},
        {"path": "/page;session=TOKEN", "raw_path": b"/page;session=TOKEN"},
        {"method": "POST", "body": b"session=TOKEN"},
        {"headers": [(b"authorization", b"Bearer TOKEN")]},
        {"headers": [(b"x-session-id", b"TOKEN"), (b"session", b"TOKEN"), (b"x-auth-token", b"TOKEN")]},
        {"headers": [(b"set-cookie", b"session=TOKEN"), (b"cookie2", b"session=TOKEN")]},
        {"headers": [(b"cookie", b"Session=TOKEN; session_=TOKEN; __Host-session=TOKEN; $session=TOKEN")]},
        {"headers": [(b"cookie", b"a=session=TOKEN, session=TOKEN")]},
    ],
)
async def test_an_id_comes_from_the_cookie_alone(service: Service, scope: dict[str, Any]) -> None:
    """The same token in a URL, a body or another header is nothing."""
    visitor = service.visitor()
    await visitor.begin(secret="s")
    token = visitor.token or ""
    sent = json.loads(json.dumps(scope, default=_text).replace("TOKEN", token))
    headers = [(name.encode(), value.encode()) for name, value in sent.pop("headers", [])]
    body = sent.pop("body", "").encode()
    sent |= {name: sent[name].encode() for name in ("query_string", "raw_path") if name in sent}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    stranger = visitor.copy(token=None)
    assert await stranger.sees(headers, receive=receive, **sent) == {}
    assert await visitor.sees() == {"secret": "s"}, "the token was a good one"


def _text(value: bytes) -> str:
    return value.decode()


def outside_the_cookie(answer: Answer) -> bytes:
    """Everything that was answered but `Set-Cookie`."""
    headers = b"".join(name + value for name, value in answer.headers if name != b"set-cookie")
    return headers + answer.body


@requirement("ID-4")
async def test_an_id_leaves_in_set_cookie_alone(service: Service, clock: Clock) -> None:
    """Pages, streams, redirects and the middleware's own answers carry it nowhere else."""
    visitor = service.visitor()
    ids = {await visitor.begin()}
    redirect = messages(start(303, [(b"location", b"/next"), (b"content-length", b"0")]), act=login)
    answers = [
        await visitor.use(app)
        for app in (page(write), stream(write, None), redirect, page(unstorable), page(logout), page(read))
    ]
    ids |= {line.partition("=")[2][:32] for answer in answers for line in answer.cookies}
    assert [answer.status for answer in answers] == [200, 200, 303, 500, 200, 200]
    for answer in answers:
        assert not [known for known in ids if known.encode() in outside_the_cookie(answer)]


def unstorable(session: Any) -> None:
    session["bad"] = object()


@requirement("COOKIE-6")
async def test_the_cookie_says_nothing_of_the_session(store: SessionStore) -> None:
    """The same length whatever is stored, and no part of it is a value of the session."""
    service, visitors = Service(store), list[Visitor]()
    for values in ({"n": 1}, {"secret": "correct horse battery staple" * 50, "user": "ada"}):
        visitor = service.visitor()
        await visitor.begin(**values)
        await visitor.open(login)
        visitors.append(visitor)
    tokens = [visitor.token or "" for visitor in visitors]
    assert len(set(map(len, tokens))) == 1
    for token in tokens:
        parts = token.split(".")
        assert len(parts) == 3
        decoded = b"".join(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in parts)
        assert b"ada" not in decoded
        assert b"horse" not in decoded
