"""What operators see: events, for the log and for the app, never with a secret or an id.

Imports only `keys`. Start with `events`.
"""
