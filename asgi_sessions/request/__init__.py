"""The life of one request: its session is loaded, stored and let go, and its answer is held back until then.

Imports what lies below it: `session`, `stores`, `client`, `observation`. Start with the table in `state`, and
read `unit` next. `commit` does its work in the store, `http` and `websocket` handle the app's messages.
"""
