"""Sessions in a SQLite database: one transaction per step, carried out by one thread of each process.

The floors from the top: `store`; `engine`, which has what one process has open; `watch`; `writer` and
`reader`; `operations` and `housekeeping`; `locks`; `records`; then what they stand on. sqlite3 is imported in
this folder and nowhere else.

How a request takes its session out:

1. `store.SQLiteSessionStore.checkout` makes a `transaction.Waiter` and asks `engine.Engine.perform` for
   `operations.check_out`.
2. Where the process is alone, the task carries it out itself (`writer.Writer.run_alone`). Otherwise the
   writer's thread takes it with all others that wait into one transaction, behind the `gate.Gate` that lets
   the processes write in turn, and brings the result to the task (`answers`).
3. `records.find` loads the record, `locks.enter` takes the lock or queues for it.
4. Who has to queue waits for `Waiter.granted`. Whoever lets the lock go hands it over in the same transaction
   (`locks.hand_over`): to a waiter of the same process with the record, to one of another process by a
   message (`waking`), upon which its `watch` has the writer look (`locks.look`). It looks 20 times a second
   in any case: messages may be lost, and processes may die (`gate.Presence`).

How it writes the session back and lets the lock go: `operations.write_back`, one transaction again. What has
to survive a power cut is committed with an fsync, for all that wait at once; locks are not.
"""

from .store import SQLiteSessionStore

__all__ = ["SQLiteSessionStore"]
