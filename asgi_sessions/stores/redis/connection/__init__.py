"""How calls reach Redis: one pipelined connection for each event loop and node.

Imports redis-py and, of this package, errors and the record's id. Knows no session, lock or key.

Start with `pipeline`: it sends a `call` and gives its future the reply. `routing` chooses the pipeline of a
key's node. `deployment` makes connection pools from a client or a URL (`urls`, `sentinels`). A pipeline reads
and writes through a `stream`: bytes taken over from redis-py (`seam`, the one module that touches its private
parts), or redis-py's public coroutines. `script`, `resp` and `replies` say what is sent and what may come
back; `faults` puts an error into an operator's words.
"""
