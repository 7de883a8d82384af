"""Sessions in Redis: one script per step, sent over one pipelined connection per event loop.

The floors from the top: `store` and `lock`; `event_loop`, which builds the rest; `locking` and `records`;
`commands`; `connection`. The scripts lie in `lua/`. Each folder says what it may import and where to start.

How a request takes its session out:

1. `store.RedisSessionStore.checkout` finds the state of the running loop (`event_loop.LoopStates.here`).
2. `locking.checkouts.Checkouts.take` gets the session's keys and the lock's timing.
3. `locking.locks.Locks.acquire` makes the session's queue in this process. Where there is one already, the
   request joins it (`locking.queue.LockQueue.join`) and waits.
4. `commands.commands.Commands.take` packs a call of `lua/acquire.lua`: lock and load.
5. `connection.routing.Router.pipeline` names the node's pipeline, `connection.pipeline.Pipeline.put` writes
   the call to a stream (`connection.seam.TakenOverStream`).
6. The reply: `TakenOverStream.buffer_updated` checks that it fits the call (`connection.replies.is_taken`)
   and resolves its future. `Commands.found` reads it. Where another process holds the lock,
   `locking.waiter.Waiter` queues in Redis and `locking.subscription.Subscription` wakes it with the record.
7. `locking.leases.Leases.hold` renews the lease from now on. The request gets a `Checkout`.

How it writes the session back and lets the lock go:

1. `store.RedisSessionStore.commit`, then `Checkouts.commit`.
2. `Locks.commit_begins` asks the queue what becomes of the lock: nobody waits here, so the script lets it
   go; or a request of this process is its successor, and the lock stays.
3. `commands.header.next_version` and `commands.commits.pack` make a call of `lua/commit.lua`: compare the
   version, write, hand the lock to the next waiter in Redis.
4. `commands.commits.noted` reads the outcome. `Locks.handed_over` gives lock and record to the successor.
"""

try:
    import redis.asyncio  # noqa: F401  # the one place that says what to install
except ImportError as missing:
    raise ImportError(
        "the Redis store needs redis-py: pip install 'asgi-server-sessions[redis]'"
    ) from missing

from .store import RedisSessionStore

__all__ = ["RedisSessionStore"]
