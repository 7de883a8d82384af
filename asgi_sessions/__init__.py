"""Server-side sessions for any ASGI app."""

__version__ = "0.1.0"
