"""Caches with a bound that several threads may use at once.

Every cache of the packages is one of these, so that none grows with the number of structures or files a process has
seen, and a value that two threads ask for at the same time is made once, by the first of them. Plans and tables that a
kernel's problem keeps for each device or size are plain dictionaries: their keys are few, and compilers trace through
them, which a lock would end.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, Generic, TypeVar

__all__ = ["Cache", "WeakKeyCache", "WeakValueCache", "cached"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Result = TypeVar("Result")


class Cache(Generic[Key, Value]):
    """Values by key; beyond `most` of them the least recently used goes.

    Copies and pickles of a cache are empty: what it holds can be made again.

        tables: Cache[int, Tensor] = Cache(most=8)
        table = tables.get(degree, lambda: make_table(degree))

    Args:
        most: values that are kept.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"most: a cache keeps at least 1 value, not {most}")
        self.most = most
        self._entries: MutableMapping[Key, Value] = OrderedDict()
        # Held while a value is made: who asks for the same one waits for it. Making one may ask for another.
        self._lock = threading.RLock()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key, made now if it is not there. Where making it raises, nothing is kept."""
        with self._lock:
            try:
                value = self._entries[key]
            except KeyError:
                value = make()
                self.put(key, value)
            else:
                self._used(key)
            return value

    def peek(self, key: Key) -> Value | None:
        """The value of a key, or None. This is no use of it."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value, in place of another one if there is one."""
        with self._lock:
            self._entries[key] = value
            self._used(key)
            while len(self._entries) > self.most:
                # The first of an ordered dictionary: the one whose last use is the longest ago.
                del self._entries[next(iter(self._entries))]

    def drop(self, key: Key) -> None:
        """Forget a value, if there is one."""
        with self._lock:
            self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def keys(self) -> list[Key]:
        """The keys at this moment, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def values(self) -> list[Value]:
        """The values at this moment, in the order of `keys`."""
        with self._lock:
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _used(self, key: Key) -> None:
        if isinstance(self._entries, OrderedDict):
            self._entries.move_to_end(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.most,)


class _WeakCache(Cache[Key, Value]):
    """A cache whose bound is what else is alive in the process."""

    def __init__(self, entries: MutableMapping[Key, Value]) -> None:
        super().__init__(most=1)
        self._entries = entries

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            self._entries[key] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class WeakKeyCache(_WeakCache[Key, Value]):
    """Values that live as long as the object they belong to."""

    def __init__(self) -> None:
        super().__init__(weakref.WeakKeyDictionary())


class WeakValueCache(_WeakCache[Key, Value]):
    """Values that are kept as long as somebody else uses them."""

    def __init__(self) -> None:
        super().__init__(weakref.WeakValueDictionary())


def cached(most: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """A decorator as `functools.lru_cache`, but a result that several threads ask for at once is computed once.

    ``function.cache_clear()`` forgets all results. Arguments are given by position.

    Args:
        most: results that are kept.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        results: Cache[tuple[Any, ...], Result] = Cache(most)

        @functools.wraps(function)
        def wrapper(*args: Any) -> Result:
            return results.get(args, lambda: function(*args))

        # As functools names it; mypy knows no attributes of functions.
        wrapper.cache_clear = results.clear  # type: ignore[attr-defined]
        return wrapper

    return decorate
