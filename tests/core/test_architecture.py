"""The plan of the house, held against the code: which module may import which."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gaq", "gaq_mace", "gaq_nequip")

# A module may import from its own level and from those above it in this list.
LEVELS = (
    (
        "gaq.settings",
        "gaq.caches",
        "gaq.process",
        "gaq.third_party_warnings",
        "gaq.config",
        "gaq.files",
        "gaq.codebooks",
    ),
    ("gaq.quantizers",),
    ("gaq.kernels", "gaq.model"),
    ("gaq.checks",),
    ("gaq.adapter",),
    ("gaq.training",),
    ("gaq.reporting",),
    ("gaq.api",),
    ("gaq.cli",),
)

# Rooms that both adapters have, under the same names.
ROOMS = (
    "adapter",
    "attention",
    "calculator",
    "engine",
    "evaluate",
    "files",
    "hook",
    "insertion",
    "layers",
    "model",
    "moments",
    "packed",
    "root",
    "sites",
    "summary",
    "training",
    "weights",
)


def modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    paths = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def _imports_for_types_only(tree: ast.AST) -> set[int]:
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {id(inner) for node in guarded for inner in ast.walk(node)}


@cache
def arrows() -> dict[str, set[str]]:
    """For each module those it imports, at the top or inside a function; what only a type checker reads left out."""
    known = modules()
    graph = {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ignored = _imports_for_types_only(tree)
        targets: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in ignored:
                continue
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: relative import in line {node.lineno}"
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    targets.add(full if full in known else str(node.module))
        graph[name] = targets - {name}
    return graph


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, empty if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in graph:
            return []
        path.append(name)
        for target in sorted(graph[name]):
            if circle := visit(target):
                return circle
        path.pop()
        done.add(name)
        return []

    for name in graph:
        if circle := visit(name):
            return circle
    return []


def test_a_circle_is_seen() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_one_that_imports_it() -> None:
    assert _circle(arrows()) == []


def _level(name: str) -> int | None:
    for level, prefixes in enumerate(LEVELS):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return level
    return None


def test_core_modules_import_downwards_only() -> None:
    known = modules()
    upwards = []
    for name, targets in arrows().items():
        if not name.startswith("gaq."):
            continue
        level = _level(name)
        assert level is not None, f"{name} stands on no level: give it one in LEVELS and in docs/dev/architecture.md"
        for target in targets:
            other = _level(target) if target in known else None
            if other is not None and other > level:
                upwards.append(f"{name} -> {target}")
    assert upwards == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("gaq", ("mace", "nequip", "allegro", "e3nn", "gaq_mace", "gaq_nequip")),
        ("gaq_mace", ("nequip", "allegro", "gaq_nequip")),
        ("gaq_nequip", ("mace", "gaq_mace")),
    ],
)
def test_packages_keep_to_their_framework(package: str, forbidden: tuple[str, ...]) -> None:
    crossing = [
        f"{name} -> {target}"
        for name, targets in arrows().items()
        if name.split(".")[0] == package
        for target in targets
        if target.split(".")[0] in forbidden
    ]
    assert crossing == []


@pytest.mark.parametrize("package", ["gaq_mace", "gaq_nequip"])
def test_both_adapters_have_the_same_rooms(package: str) -> None:
    present = {path.stem if path.is_file() else path.name for path in (ROOT / package).iterdir()}
    assert [room for room in ROOMS if room not in present] == []


def test_hooks_stand_on_top() -> None:
    """Nothing but a command, an adapter and the package itself knows that the framework is patched."""
    allowed = {"gaq_mace.adapter", "gaq_mace.commands", "gaq_nequip", "gaq_nequip.adapter", "gaq_nequip.builder"}
    users = {
        name
        for name, targets in arrows().items()
        if ".hook" not in name and any(".hook" in target for target in targets)
    }
    assert users <= allowed


DOCUMENTS = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@cache
def _defined(name: str) -> frozenset[str]:
    """Names that a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(modules()[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return frozenset(names)


def _public(package: str) -> set[str]:
    """What a package offers by lazy import: the keys of its ``_PUBLIC``."""
    for node in ast.parse(modules()[package].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            return set(ast.literal_eval(node.value))
    return set()


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that one defines."""
    module, _, attribute = name.rpartition(".")
    known = modules()
    return name in known or (module in known and (attribute in _defined(module) or attribute in _public(module)))


# Entry point groups and files that begin like a module.
NOT_MODULES = {"gaq.adapters"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_the_documents_are_those_of_the_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"`(gaq(?:_mace|_nequip)?(?:\.\w+)+)(?:\(.*?\))?`", text)) - NOT_MODULES
    assert [name for name in sorted(names) if not _exists(name)] == []
    files = set(re.findall(r"`((?:gaq|gaq_mace|gaq_nequip|benchmarks|tests|examples|docs|tools)/[\w./]+)`", text))
    assert [name for name in sorted(files) if "NAME" not in name and not (ROOT / name).exists()] == []
