"""What a client sends and what it is told: headers, cookies, its address, its fingerprint, caches.

Nothing here knows sessions or stores. Imports `asgi` and `keys` only. Start with `cookie`, whose signature
is made in `signer`; `fingerprint` stands on `address`.
"""
