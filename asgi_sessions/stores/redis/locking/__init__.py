"""The lock of a session: who has it, who waits, and how it passes on.

Imports `commands` and `connection`. Knows nothing of records but their bytes.

Start with `checkouts`: locked and unlocked loads, commits and releases of one event loop. `locks` are the
queues within the process; `queue` decides and `locks` carries out. `waiter` is one caller's way to a lock in
Redis, `subscription` the channel by which Redis wakes it, `seat` where a request waits behind others of its
process, `notice` what it is told when that takes long. `leases` renews what is held, `releases` repeats a
release that failed.
"""
