"""RESP, the protocol of Redis: how a command is written."""

from __future__ import annotations


def pack(*args: bytes) -> bytes:
    """One command."""
    return (b"*%d\r\n" % len(args)) + pack_args(*args)


def pack_args(*args: bytes) -> bytes:
    """Some of a command's arguments; packed parts can be joined."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args])
