"""Puts an error of Redis into an operator's words: what happened, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BROKEN = "(?:[Cc]onnection (?:was )?closed|[Cc]onnection lost|reset by peer|Broken pipe|IncompleteRead)"

# The first that matches the names and texts of an error and its causes. {1} is what the pattern has caught.
_WORDS: tuple[tuple[str, str], ...] = (
    # who we are
    (r"WRONGPASS|invalid username-password|invalid password", "wrong password, or unknown user"),
    (r"without any password configured", "wrong password: one is given, and Redis asks for none"),
    (r"NOAUTH|Authentication required", "no password given: redis://:PASSWORD@host"),
    (r"no permissions to run the '([\w|]+)'", "the ACL user may not run {1}: allow +{1}"),
    (r"can't run this command", "the ACL user may not run a command that scripts use"),
    (r"[Nn]o permissions.*channel", "the ACL user may not use its channels: &PREFIX*"),
    (r"[Nn]o permissions.*key", "the ACL user may not use its keys: ~PREFIX*"),
    # TLS
    (r"(?:Hostname|IP address) mismatch", "certificate not trusted: it is for another host name"),
    (r"certificate has expired|CERTIFICATE_EXPIRED", "certificate not trusted: it has expired"),
    (r"CERTIFICATE_VERIFY_FAILED", "certificate not trusted: ssl_ca_certs names the file of its CA"),
    (r"CERTIFICATE_REQUIRED|ALERT_(?:BAD|UNKNOWN)|HANDSHAKE_FAILURE",
     "client certificate missing or refused: see ssl_certfile and ssl_keyfile"),
    (r"WRONG_VERSION_NUMBER|SSLError.*(?:RECORD|PACKET|PROTOCOL)", "no TLS is spoken there: redis://, not rediss://"),
    (r"TLS (?s:.*)(?:FileNotFoundError|\bPermissionError)", "a certificate's or key's file cannot be read"),
    (rf"TLS (?s:.*){_BROKEN}",
     "the connection was refused: is a client certificate missing (ssl_certfile, ssl_keyfile)?"),
    (r"TLS (?s:.*)Timeout", "no answer to TLS: is it spoken there (else redis://, not rediss://)?"),
    # the address
    (r"gaierror", "unknown host{address}"),
    (r"ConnectionRefusedError", "nothing listens at{address}"),
    (r"FileNotFoundError", "there is no socket at{address}"),
    (r"\bPermissionError", "this process may not open{address}"),
    (r"No master found|MasterNotFoundError", "no Sentinel that can be reached knows a primary of this name"),
    (r"DB index is out of range|invalid DB index|Invalid Database", "no such db: its number is out of range"),
    (r"MovedError|AskError", "this is a cluster: redis+cluster://"),
    (r"cluster support disabled", "this is no cluster: redis://"),
    (r"unexpected keyword argument '(\w+)'", "unknown option {1}"),
    (r"Invalid SSL Certificate Requirements", "ssl_cert_reqs is one of required, optional and none"),
    # how it is
    (r"LOADING|BusyLoadingError|loading the dataset", "Redis is loading its data"),
    (r"READONLY|ReadOnlyError|read only replica", "this is a read-only replica, not the primary"),
    (r"MASTERDOWN|MasterDownError", "this is a replica that has lost its primary"),
    (r"\bBUSY\b|is busy running a script", "Redis is busy with a script of somebody's: SCRIPT KILL ends it"),
    (r"\bOOM\b|used memory >", "Redis is out of memory (maxmemory)"),
    (r"MISCONF", "Redis cannot write its data to disk (MISCONF), so it takes no changes"),
    (r"NOREPLICAS", "too few replicas follow (min-replicas-to-write), so Redis takes no changes"),
    (r"CLUSTERDOWN|ClusterDownError", "the cluster is down: slots are not served"),
    (r"max number of clients", "Redis has too many clients (maxclients)"),
    (r"WRONGTYPE", "something else lies under a key of the store"),
    (r"unknown command[ `']*(\w+)", "Redis does not know {1}: it is renamed, or older than 6.2"),
    (r"Unknown Redis command called|script.*syntax error", "Redis is too old: 6.2 or newer is needed"),
    # the line
    (rf"PLAIN (?s:.*)(?:{_BROKEN}|Protocol Error|InvalidResponse)",
     "the connection was refused: is TLS wanted there (rediss://)?"),
    (r"(?:PLAIN|LINE) (?s:.*)Timeout", "no answer in time"),
    (r"Protocol Error|InvalidResponse|ProtocolError", "what answers there is not Redis"),
    (_BROKEN, "the connection broke"),
)  # fmt: skip
_KNOWN = tuple((re.compile(pattern), words) for pattern, words in _WORDS)
_AT = re.compile(r"connecting to (\S+)\. ")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\{[^}]*\}")
_LONG = re.compile(r"\S{24,}|//\S*@")  # ids, tokens and whole URLs; words are shorter
_MOST = 160  # characters of what no pattern knows


def explain(error: BaseException | None, *, tls: bool | None = None) -> str:
    """The cause in words, never a secret: of what is quoted, at most a command's or an option's name is told.

    `tls` says how a connection was being made, with TLS or without; None: it stood.
    """
    line = {None: "LINE", True: "TLS", False: "PLAIN"}[tls]
    text = " ".join([line, *(f"{type(each).__name__}: {each}" for each in _causes(error))])
    for pattern, words in _KNOWN:
        found = pattern.search(text)
        if found is not None:
            caught = found[1] if found.re.groups else ""
            return words.replace("{1}", caught).replace("{address}", _address(text))
    return _scrubbed(f"{type(error).__name__}: {error}" if error is not None else "unknown")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _address(text: str) -> str:
    found = _AT.search(text)
    return f" {found[1]}" if found is not None else " its address"


def _scrubbed(text: str) -> str:
    return _LONG.sub("…", _QUOTED.sub("…", text))[:_MOST]
