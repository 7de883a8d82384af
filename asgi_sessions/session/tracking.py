"""The dict that an app uses, noting how: read, or changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing itself from Python 3.11


class TrackedDict(dict[str, Any]):
    """A dict that knows whether it was `accessed` and `modified`, as Starlette's session does.

    Every way of reading counts as access, so that an answer that depends on it says `Vary: Cookie`: text and
    copies of it too. What reads a dict below Python's surface is not seen: `json.dumps` of an empty session,
    and encoders such as orjson. After those call `mark_accessed()` (Starlette's `request.session` does).
    Copies and pickles of it are plain dicts.
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

    def replace_all(self, values: Mapping[str, Any]) -> None:
        """Have these values and no others. The change was announced by `before_change`."""
        dict.clear(self)
        dict.update(self, values)

    def clear(self) -> None:
        self.mark_modified()
        dict.clear(self)

    def __getitem__(self, key: str) -> Any:
        self.accessed = True
        return dict.__getitem__(self, key)

    def get(self, key: str, default: Any = None, /) -> Any:
        self.accessed = True
        return dict.get(self, key, default)

    def __contains__(self, key: object) -> bool:
        self.accessed = True
        return dict.__contains__(self, key)

    def __iter__(self) -> Iterator[str]:
        self.accessed = True
        return dict.__iter__(self)

    def __len__(self) -> int:
        self.accessed = True
        return dict.__len__(self)

    def __reversed__(self) -> Iterator[str]:
        self.accessed = True
        return dict.__reversed__(self)

    def __eq__(self, other: object) -> bool:
        self.accessed = True
        return dict.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self.accessed = True
        return dict.__ne__(self, other)

    def __repr__(self) -> str:
        self.accessed = True
        return dict.__repr__(self)

    def __or__(self, other: Any, /) -> Any:
        self.accessed = True
        return dict.__or__(self, other)

    def __ror__(self, other: Any, /) -> Any:
        self.accessed = True
        return dict.__ror__(self, other)

    def copy(self) -> dict[str, Any]:
        return self.__copy__()

    def keys(self) -> Any:
        self.accessed = True
        return dict.keys(self)

    def values(self) -> Any:
        self.accessed = True
        return dict.values(self)

    def items(self) -> Any:
        self.accessed = True
        return dict.items(self)

    def __setitem__(self, key: str, value: Any) -> None:
        self.mark_modified()
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        self.mark_modified()
        dict.__delitem__(self, key)

    def pop(self, key: str, *default: Any) -> Any:
        if key in self:
            self.mark_modified()
        return dict.pop(self, key, *default)

    def popitem(self) -> tuple[str, Any]:
        if self:
            self.mark_modified()
        return dict.popitem(self)

    def setdefault(self, key: str, default: Any = None, /) -> Any:
        if key not in self:
            self.mark_modified()
        return dict.setdefault(self, key, default)

    def update(self, *args: Any, **values: Any) -> None:
        self.mark_modified()
        dict.update(self, *args, **values)

    def __ior__(self, other: Any, /) -> Self:  # type: ignore[override]  # as Starlette's
        self.mark_modified()
        dict.update(self, other)
        return self

    def __copy__(self) -> dict[str, Any]:
        self.accessed = True
        return dict(dict.items(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        self.accessed = True
        plain: dict[str, Any] = {}
        memo[id(self)] = plain  # first, for it may contain itself
        plain.update((key, copy.deepcopy(value, memo)) for key, value in dict.items(self))
        return plain

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        self.accessed = True
        return dict, (dict(dict.items(self)),)
