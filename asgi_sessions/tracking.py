"""The dict that an app uses, noting how: read, or changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .content import Content


class TrackedDict(Content):
    """A dict that knows whether it was `accessed` and `modified`, as Starlette's session does.

    Every way of reading counts as access, so that an answer that depends on it says `Vary: Cookie`.
    """

    __slots__ = ("accessed", "modified")

    accessed: bool
    modified: bool

    def mark_accessed(self) -> None:
        """Note that the answer depends on the session: it will say `Vary: Cookie`."""
        self.accessed = True

    def mark_modified(self) -> None:
        """Note a change. Not needed for one to be stored; raises where it could not be."""
        self.accessed = True
        self.modified = True

    def before_change(self) -> None:
        """Called by the record when one of its fields is assigned."""
        self.mark_modified()

    def clear(self) -> None:
        """Empty the session: the values, and the record's fields go back to their defaults.

        A session that is left empty ends, as in Starlette: record deleted, cookie removed.
        """
        self.mark_modified()
        self.empty(None)

    def __getitem__(self, key: str) -> Any:
        self.accessed = True
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None, /) -> Any:
        self.accessed = True
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.accessed = True
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self.accessed = True
        return super().__iter__()

    def __len__(self) -> int:
        self.accessed = True
        return super().__len__()

    def __reversed__(self) -> Iterator[str]:
        self.accessed = True
        return super().__reversed__()

    def __eq__(self, other: object) -> bool:
        self.accessed = True
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        self.accessed = True
        return super().__ne__(other)

    def __or__(self, other: Any, /) -> Any:
        self.accessed = True
        return super().__or__(other)

    def __ror__(self, other: Any, /) -> Any:
        self.accessed = True
        return super().__ror__(other)

    def copy(self) -> dict[str, Any]:
        self.accessed = True
        return super().copy()

    def keys(self) -> Any:
        self.accessed = True
        return super().keys()

    def values(self) -> Any:
        self.accessed = True
        return super().values()

    def items(self) -> Any:
        self.accessed = True
        return super().items()

    def __setitem__(self, key: str, value: Any) -> None:
        self.mark_modified()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.mark_modified()
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self.mark_modified()
        return super().pop(key, *default)

    def popitem(self) -> tuple[str, Any]:
        if self:
            self.mark_modified()
        return super().popitem()

    def setdefault(self, key: str, default: Any = None, /) -> Any:
        if key not in self:
            self.mark_modified()
        return super().setdefault(key, default)

    def update(self, *args: Any, **values: Any) -> None:
        self.mark_modified()
        super().update(*args, **values)

    def __ior__(self, other: Any, /) -> TrackedDict:  # type: ignore[override]  # as Starlette's
        self.mark_modified()
        super().update(other)
        return self
