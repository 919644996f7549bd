"""Bounded caches that several threads may share.

All caches of the packages are of these classes: none grows with the number of structures or files of a process, and a
value that two threads ask for at the same time is made only once. The exceptions are the plans and tables that a
kernel's problem keeps for each device or size. They are plain dictionaries, because their keys are few and compilers
trace through them, which a lock would prevent.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping
from typing import Generic, TypeVar

__all__ = ["Cache", "WeakKeyCache", "WeakValueCache", "cached"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Result = TypeVar("Result")


class Cache(Generic[Key, Value]):
    """Values by key; beyond `most` values the least recently used one is dropped.

    Copies and pickles of a cache are empty: its values can be made again.

        tables: Cache[int, Tensor] = Cache(most=8)
        table = tables.get(degree, lambda: make_table(degree))

    Args:
        most: largest number of values.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"most: a cache keeps at least 1 value, not {most}")
        self.most = most
        self._entries: MutableMapping[Key, Value] = OrderedDict()
        # Held while a value is made, so that other threads wait for it. Reentrant: making a value may ask for another.
        self._lock = threading.RLock()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, and make it if it is missing. If making it raises, nothing is kept."""
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
        """Return the value of a key, or None, without counting as a use."""
        with self._lock:
            return self._entries.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Store a value, in place of a previous one."""
        with self._lock:
            self._entries[key] = value
            self._used(key)
            while len(self._entries) > self.most:
                # The first entry is the least recently used.
                del self._entries[next(iter(self._entries))]

    def drop(self, key: Key) -> None:
        """Remove a value, if there is one."""
        with self._lock:
            self._entries.pop(key, None)

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._entries.clear()

    def keys(self) -> list[Key]:
        """Return the present keys, the least recently used first."""
        with self._lock:
            return list(self._entries)

    def values(self) -> list[Value]:
        """Return the present values, in the order of `keys`."""
        with self._lock:
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _used(self, key: Key) -> None:
        if isinstance(self._entries, OrderedDict):
            self._entries.move_to_end(key)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.most,)


class _WeakCache(Cache[Key, Value]):
    """A cache whose entries vanish with the objects they refer to."""

    def __init__(self, entries: MutableMapping[Key, Value]) -> None:
        super().__init__(most=1)
        self._entries = entries

    def put(self, key: Key, value: Value) -> None:
        with self._lock:
            self._entries[key] = value

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), ()


class WeakKeyCache(_WeakCache[Key, Value]):
    """Values that live as long as their keys."""

    def __init__(self) -> None:
        super().__init__(weakref.WeakKeyDictionary())


class WeakValueCache(_WeakCache[Key, Value]):
    """Values that live as long as something else refers to them."""

    def __init__(self) -> None:
        super().__init__(weakref.WeakValueDictionary())


def cached(most: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Decorate a function like `functools.lru_cache`, but compute a result once if several threads ask for it.

    ``function.cache_clear()`` removes all results. Arguments are positional.

    Args:
        most: largest number of results.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        results: Cache[tuple[object, ...], Result] = Cache(most)

        @functools.wraps(function)
        def wrapper(*args: object) -> Result:
            return results.get(args, lambda: function(*args))

        wrapper.cache_clear = results.clear  # type: ignore[attr-defined]  # functools' name; mypy has no such attribute
        return wrapper

    return decorate
