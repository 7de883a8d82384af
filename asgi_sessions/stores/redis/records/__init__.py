"""Records without their locks, and which sessions a user has.

Imports `commands` and `connection`. What waits for a lock is told of a deletion by a function.

Start with `operations`: reads, writes, deletes and scans of one event loop. `index` links users to their
sessions, by which a sign-out ends them all.
"""
