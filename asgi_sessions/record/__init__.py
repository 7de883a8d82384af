"""The typed record of a session: its model, and how it is written as bytes and read back.

Nothing here knows stores or requests. Imports only `errors`. Start with `model`, then `codec`.
"""
