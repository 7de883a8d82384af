"""The commits of one request: one at a time, and what the request learns from each."""

from __future__ import annotations

import anyio

from ..errors import SessionDataError
from ..session.changes import Change, Fate
from ..stores.checkout import Checkout, Outcome
from .commit import Commit, let_go, was_replaced
from .devices import note_client
from .state import OPTIMISTIC, RELEASED, News
from .work import Work

# bound once: looking up an Enum's member costs ten times a global on Python 3.11, and each request does it
_QUIET, _TOLD, _KEEP = News.NOTHING, News.TOLD, Fate.KEEP


async def carry_out(work: Work, change: Change, *, release: bool) -> Outcome:
    """Do to the store what the handle asks for. Whatever comes of it, the request has learned it then."""
    if work.settings.recorder is not None:
        note_client(work)
    commit = work.committing = Commit(
        work.settings,
        work.session,
        release,
        work.news is _TOLD,
        work.tried,
        work.state is OPTIMISTIC,
        work.may_run_again(),
        work.is_last,
    )
    try:
        return await commit.carry_out(change, work.record, work.held_since)
    except BaseException as error:
        work.has_stored = work.has_stored or not isinstance(error, SessionDataError)
        raise
    finally:
        work.committing = None
        _learn(work, commit)
        if work.state is RELEASED:  # the request has ended meanwhile: nobody else lets go
            await work.abandon()


def _learn(work: Work, commit: Commit) -> None:
    work.tried = commit.tried
    if commit.has_ended and work.is_clients:
        work.client_ended = True
    if commit.has_begun:
        work.is_clients = False
    if commit.locked is not None:
        work.hold(commit.locked)
    if commit.record is not None:
        work.hold(commit.record)
        if commit.new_id is not None or not commit.is_bound:
            work.tell(commit.new_id)
        elif work.news is _QUIET:
            work.news = News.REFRESH  # its `Max-Age` follows
    elif commit.has_ended and not isinstance(work.news, str):
        work.tell(None)
    if commit.intent is not _KEEP:
        work.session.want(commit.intent)
    if commit.is_over is not None:
        commit.is_over.set()


async def commit_is_over(work: Work) -> None:
    """Wait for the commit of another task of the request."""
    while (commit := work.committing) is not None:
        commit.is_over = commit.is_over or anyio.Event()
        await commit.is_over.wait()


async def why_gone(work: Work) -> Outcome:
    """GONE where the record has ended; CONFLICT where it has a new id, whose cookie the client gets."""
    if not isinstance(work.record, Checkout):
        return Outcome.GONE
    await let_go(work.settings, work.record)
    if not await was_replaced(work.settings, work.record):
        return Outcome.GONE
    work.is_clients = False
    return Outcome.CONFLICT
