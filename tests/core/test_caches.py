"""Caches: bounded, each value made once, empty in copies."""

from __future__ import annotations

import ast
import copy
import gc
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gaq.caches import Cache, WeakKeyCache, WeakValueCache, cached

ROOT = Path(__file__).parents[2]


class Thing:
    """Something that can be referred to weakly."""


def test_the_least_recently_used_goes() -> None:
    cache: Cache[int, str] = Cache(most=2)
    for key in (1, 2, 1, 3):
        assert cache.get(key, lambda key=key: f"made {key}") == f"made {key}"  # type: ignore[misc]  # mypy cannot type the default
    assert cache.keys() == [1, 3]
    assert cache.values() == ["made 1", "made 3"]
    assert cache.peek(2) is None
    assert cache.get(1, lambda: "anew") == "made 1"
    cache.put(1, "other")
    cache.drop(3)
    cache.drop(3)
    assert (cache.keys(), cache.peek(1), len(cache)) == ([1], "other", 1)
    cache.clear()
    assert len(cache) == 0
    with pytest.raises(ValueError, match="at least 1 value, not 0"):
        Cache(most=0)


def test_none_is_a_value_and_an_error_is_not() -> None:
    cache: Cache[int, Any] = Cache(most=2)
    assert cache.get(1, lambda: None) is None
    assert cache.get(1, lambda: "anew") is None

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get(2, fail)
    assert cache.get(2, lambda: "made") == "made"


def test_making_a_value_may_ask_for_another() -> None:
    cache: Cache[int, int] = Cache(most=4)

    def factorial(n: int) -> int:
        return cache.get(n, lambda: n * factorial(n - 1) if n else 1)

    assert factorial(6) == 720
    assert len(cache) == 4


@pytest.mark.parametrize("kind", ["cache", "weak keys", "weak values", "function"])
def test_threads_that_ask_at_once_get_one_value(kind: str) -> None:
    made: list[Thing] = []

    def make(*_: Any) -> Thing:
        time.sleep(0.05)
        made.append(Thing())
        return made[-1]

    key = Thing()
    caches: dict[str, Any] = {"cache": Cache(most=2), "weak keys": WeakKeyCache(), "weak values": WeakValueCache()}
    ask = cached(1)(make) if kind == "function" else lambda key: caches[kind].get(key, make)
    barrier, received = threading.Barrier(6), []

    def run() -> None:
        barrier.wait()
        received.append(ask(key))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert received == made * 6


def test_weak_caches_are_bounded_by_what_is_alive() -> None:
    by_key: WeakKeyCache[Thing, str] = WeakKeyCache()
    by_value: WeakValueCache[int, Thing] = WeakValueCache()
    keys = [Thing() for _ in range(5)]
    values = [by_value.get(i, Thing) for i in range(5)]
    assert [by_key.get(key, lambda: "made") for key in keys] == ["made"] * 5
    assert by_value.get(3, Thing) is values[3]
    assert (len(by_key), len(by_value)) == (5, 5)
    del keys[1:], values[1:]
    gc.collect()
    assert (len(by_key), len(by_value)) == (1, 1)
    assert by_key.peek(keys[0]) == "made"
    assert len(copy.deepcopy(by_key)) == len(copy.deepcopy(by_value)) == 0


def test_copies_and_pickles_are_empty() -> None:
    cache: Cache[int, str] = Cache(most=3)
    cache.put(1, "one")
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(other), other.most) == (0, 3)
        assert other.get(2, lambda: "two") == "two"
    assert cache.keys() == [1]


def test_functions() -> None:
    calls = []

    @cached(most=2)
    def double(x: int) -> int:
        """Twice."""
        calls.append(x)
        return 2 * x

    assert [double(x) for x in (1, 2, 1, 3, 1, 2)] == [2, 4, 2, 6, 2, 4]
    assert calls == [1, 2, 3, 2]
    double.cache_clear()  # type: ignore[attr-defined]  # as in functools
    assert double(1) == 2
    assert calls == [1, 2, 3, 2, 1]
    assert double.__doc__ == "Twice."


def test_the_packages_have_no_other_caches() -> None:
    """No `functools.cache` or weak dictionary, and no dictionary of a module that a function writes to."""
    uses = []
    for package in ("gaq", "gaq_mace", "gaq_nequip"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path == ROOT / "gaq" / "caches.py":
                continue
            tree = ast.parse(path.read_text())
            empty = set()
            for node in tree.body:
                value = getattr(node, "value", None)
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(value, ast.Dict) and not value.keys:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    empty |= {target.id for target in targets if isinstance(target, ast.Name)}
            names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
            attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            names |= {node.attr for node in attributes if ast.unparse(node.value) in ("functools", "weakref")}
            forbidden = {"cache", "lru_cache", "WeakKeyDictionary", "WeakValueDictionary"} & names
            uses += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(empty | forbidden)]
    assert uses == []
