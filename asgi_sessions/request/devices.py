"""The sessions of the user who is signed in: a list of devices, and the way to end one of them."""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator
from contextlib import aclosing
from operator import attrgetter

from ..client.agent import name_of
from ..record.sighting import Sighting
from ..session.changes import Fate
from ..session.device import Device
from .work import Work

PURPOSE = b"asgi_sessions: handles of devices"


async def devices(work: Work) -> list[Device]:
    """See `Session.devices`."""
    keys, current = work.settings.device_keys, work.session.identity().session_id
    found: list[Device] = []
    async with aclosing(_sightings(work)) as seen:
        async for each in seen:
            handle, is_current = _handle(keys[0], each), each.session_id == current
            name = name_of(each.user_agent)
            found.append(Device(handle, name, each.address, each.created_at, each.last_activity, is_current))
    found.sort(key=attrgetter("current", "last_activity"), reverse=True)
    return found


async def end_device(work: Work, handle: object) -> bool:
    """See `Session.end_device`. All sessions of the user are compared, whichever it is.

    Where the session gets a new id before it is deleted, it is looked for again.
    """
    if not isinstance(handle, str):
        return False
    given = handle.encode("utf-8", "surrogatepass")
    while meant := await _meant(work, given):
        if work.session.identity().session_id in meant:
            work.session.invalidate()
            return True
        if any((await work.settings.store.delete_batch(meant)).values()):
            return True
    return False


async def _meant(work: Work, given: bytes) -> list[str]:
    """The id of the session of this handle; its old and its new one while it gets another."""
    meant: list[str] = []
    async with aclosing(_sightings(work)) as seen:
        async for each in seen:
            for key in work.settings.device_keys:
                if hmac.compare_digest(_handle(key, each).encode(), given):
                    meant.append(each.session_id)
    return meant


def note_client(work: Work) -> None:
    """Keep the client in the record of a session that begins with a sign-in."""
    session, recorder = work.session, work.settings.recorder
    if recorder is None or not work.scope:
        return
    if session.fate is Fate.SIGN_IN or (session.fate is Fate.END and session.identity().user_id is not None):
        session.note_client(*recorder.of(work.scope))


async def _sightings(work: Work) -> AsyncGenerator[Sighting, None]:
    user_id = work.session.identity().user_id
    if user_id is not None:
        async with aclosing(work.settings.store.iter_for_user(user_id)) as seen:
            async for each in seen:
                yield each


def _handle(key: bytes, each: Sighting) -> str:
    """By what stays when the session gets a new id."""
    named = f"{each.created_at.isoformat()} {each.user_id}"
    return hmac.digest(key, named.encode("utf-8", "surrogatepass"), "sha256").hex()[:32]
