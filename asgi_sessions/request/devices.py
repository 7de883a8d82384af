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
            handle, is_current = _handle(keys[0], each.session_id), each.session_id == current
            name = name_of(each.user_agent)
            found.append(Device(handle, name, each.address, each.created_at, each.last_activity, is_current))
    found.sort(key=attrgetter("current", "last_activity"), reverse=True)
    return found


async def end_device(work: Work, handle: object) -> bool:
    """See `Session.end_device`. All sessions of the user are compared, whichever it is."""
    if not isinstance(handle, str):
        return False
    given, meant = handle.encode("utf-8", "surrogatepass"), None
    async with aclosing(_sightings(work)) as seen:
        async for each in seen:
            for key in work.settings.device_keys:
                if hmac.compare_digest(_handle(key, each.session_id).encode(), given):
                    meant = each.session_id
    if meant is None:
        return False
    if meant == work.session.identity().session_id:
        work.session.invalidate()
        return True
    return await work.settings.store.delete(meant)


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


def _handle(key: bytes, session_id: str) -> str:
    return hmac.digest(key, session_id.encode("utf-8", "surrogatepass"), "sha256").hex()[:32]
