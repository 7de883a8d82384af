"""What a client sends and is told: headers, cookies, its fingerprint, what caches may keep.

Nothing here knows sessions or stores. Imports only `asgi`, `errors` and `keys`. Start with `cookie`.
"""
