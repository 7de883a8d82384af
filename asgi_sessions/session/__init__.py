"""What an app holds of its session: the dict, and the draft of the record behind it.

Nothing here does any I/O: what a commit has to do is decided here, and done in `request`. Imports `record`
and `errors`. Start with `handle`.
"""
