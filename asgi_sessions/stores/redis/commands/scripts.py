"""The scripts. Their headers in `lua/` say keys, arguments and replies.

Each script recognises its own retry, so a call whose connection was lost may be sent again.
"""

from __future__ import annotations

from ..connection.replies import (
    is_about,
    is_bound,
    is_created,
    is_list,
    is_number,
    is_removed,
    is_stored,
    is_taken,
    is_text,
)
from ..connection.script import Script

# With the keys of a session:
ACQUIRE = Script("acquire", 4, 7, fits=is_taken)
TAKE = Script("acquire", 4, 2, fits=is_taken)  # a single try
TAKE_AND_TELL = Script("acquire", 4, 3, fits=is_taken)  # the time too
_OVERWRITTEN = (b"LOST", b"CONFLICT")  # or stored, and written over since
COMMIT = Script("commit", 4, 5, doubtful=_OVERWRITTEN, fits=is_stored)
COMMIT_AGAIN = Script("commit", 4, 6, doubtful=_OVERWRITTEN, fits=is_stored)  # after one of unknown outcome
COMMIT_UNLOCKED = Script(  # BUSY: the first one may still arrive, when nobody holds the lock any more
    "commit_unlocked", 4, 3, doubtful=(*_OVERWRITTEN, b"BUSY"), fits=is_stored
)
SHORTEN = Script("shorten", 4, 4, fits=is_taken)
BOUND = Script("bound", 4, 5, doubtful=_OVERWRITTEN, fits=is_bound)
REMOVE = Script("remove", 4, 8, fits=is_removed)
RELEASE = Script("release", 4, 4, fits=is_number)
# With keys of their own:
FOLLOW = Script("follow", 1, 2, fits=is_about)
CREATE = Script("create", 2, 8, fits=is_created)
RENEW = Script("renew", 1, 2, fits=is_number)
SET = Script(  # once: again, it would take back what others have written since
    "set", 1, 5, once=True, fits=is_number
)
TOUCH = Script("touch", 1, 1, prompt=False, fits=is_number)
# With a user's index:
LINK = Script("link", 1, 4, fits=is_list)
SUCCEED = Script("succeed", 1, 3, fits=is_text)
MARK = Script("mark", 1, 1, fits=is_list)
SURPLUS = Script("surplus", 1, 3, fits=is_list)
SETTLE = Script("settle", 1, 2, fits=is_number)
