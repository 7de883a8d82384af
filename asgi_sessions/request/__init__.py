"""The life of one request: its session is loaded, stored and let go, and its answer is held back until then.

Imports what lies below it: `session`, `stores`, `client`, `observation`. Start with the table in `state`, then
read `unit`. `commit` is what it does in the store, `http` and `websocket` are what becomes of the messages.
"""
