"""What is asked of Redis, and what its replies say.

Imports `connection`, and of the stores what passes between a store and a request. Holds no lock and waits for
none.

Start with `commands`, the calls of one event loop. `scripts` has the Lua scripts, `keys` the names of their
keys, `header` what stands before a record, `timing` the times of a lock as scripts need them. `commits` packs
a commit and reads its reply, `who` says who holds a lock.
"""
