"""Where records live: what a store promises, the store in memory, and SQLite and Redis in rooms of their own.

Imports `session`, `record` and what is below them; `sqlite/` and `redis/` may import this folder, but
nothing else here may import them (`urls` loads the one that a URL asks for). Start with `checkout`, which has
the values that pass between a store and a request, then `contract`, which has the published class.

`checkouts` keeps the promises on four primitives of somebody else's store, with `primitives`, `value` and
`local`; `holders` are what those who wait for a lock are told. `memory` keeps them on a `table` of
`entries`, and warns where `workers` says that others serve the app beside it.
"""
