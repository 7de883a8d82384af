"""The life of one request: its session is loaded, stored and let go, and its answer is held back until then.

Imports everything below: `session`, `stores`, `client`, `observation`. Start with `unit` for what happens to
the session, and with `exchange` for what happens to the answer.
"""
