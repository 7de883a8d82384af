"""The life of one request: its session is loaded, stored and let go, and its answer is held back until then.

Imports what lies below it: `session`, `stores`, `client`, `observation`. Start with the table in `state`, and
read `unit` next. `opening` loads for it, `commits` has it store one thing at a time, `transactions` has its
tasks take turns; `commit` and `transaction` are one of each, and `work` is what these see of the unit. `http`
and `websocket` handle the app's messages. `running` is what stores see.
"""
