"""docs/dev/architecture.md against the code: which module may import which, and whether what documents name exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("gaq", "gaq_mace", "gaq_nequip")

ARCHITECTURE = ROOT / "docs" / "dev" / "architecture.md"
# A module of the core may import from its own level and from those above it in this list: the rows of the table.
LEVELS = (
    ("gaq.untyped",),
    ("gaq.settings", "gaq.caches", "gaq.home", "gaq.process", "gaq.progress", "gaq.third_party_warnings"),
    ("gaq.config",),
    ("gaq.files",),
    ("gaq.codebooks",),
    ("gaq.quantizers",),
    ("gaq.kernels",),
    ("gaq.model",),
    ("gaq.checks",),
    ("gaq.deployed", "gaq.ase"),
    ("gaq.adapter",),
    ("gaq.training",),
    ("gaq.reporting",),
    ("gaq.lammps",),
    ("gaq.api", "gaq.deployment", "gaq.cli"),
)

# Modules that both adapters have, under the same names.
SHARED = (
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
    "names",
    "packed",
    "root",
    "sites",
    "summary",
    "training",
    "weights",
)


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    paths = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def _tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def _imports_for_types_only(tree: ast.AST) -> set[int]:
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {id(inner) for node in guarded for inner in ast.walk(node)}


@cache
def arrows() -> dict[str, set[str]]:
    """The modules that each module imports, at the top or inside a function, but for what only a type checker reads."""
    known = modules()
    graph = {}
    for name in known:
        tree = _tree(name)
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


def test_a_circle_is_detected() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_one_that_imports_it() -> None:
    assert _circle(arrows()) == []


def test_imported_names_exist() -> None:
    """Also inside functions, where a name that has moved would raise only when the function is called."""
    missing = [
        f"{name}, line {node.lineno}: {node.module}.{alias.name}"
        for name in modules()
        for node in ast.walk(_tree(name))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES
        for alias in node.names
        if not _exists(f"{node.module}.{alias.name}")
    ]
    assert missing == []


SCRIPTS = sorted(
    path for folder in ("benchmarks", "examples", "tests", "tools") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_that_scripts_and_tests_import_exist(path: Path) -> None:
    """Scripts that no test runs would fail only where they are needed."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        names = [alias.name for alias in node.names]
        siblings = [folder / f"{node.module}.py" for folder in (path.parent, ROOT / "tests" / "helpers")]
        sibling = next((file for file in siblings if file.is_file()), None)
        if node.module.split(".")[0] in PACKAGES:
            missing += [f"{node.module}.{name}" for name in names if not _exists(f"{node.module}.{name}")]
        elif sibling is not None:
            defined = _names_in(ast.parse(sibling.read_text(encoding="utf-8")).body)
            missing += [f"{node.module}.{name}" for name in names if name not in defined]
    assert missing == []


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
            target_level = _level(target) if target in known else None
            if target_level is not None and target_level > level:
                upwards.append(f"{name} -> {target}")
    assert upwards == []


def _first_column(heading: str) -> list[tuple[str, ...]]:
    """The names in the first column of the table under a heading of the architecture page, a tuple a row."""
    section = ARCHITECTURE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", section, re.MULTILINE)
    return [tuple(re.findall(r"`([\w.]+)`", row)) for row in rows]


def test_the_table_of_the_core_is_the_order_of_the_levels() -> None:
    assert tuple(_first_column("The core, from the bottom up")) == LEVELS


def test_the_table_of_the_adapters_names_all_their_modules() -> None:
    named = {name for row in _first_column("The adapters") for name in row}
    present = {name.split(".")[1] for name in modules() if name.startswith(("gaq_mace.", "gaq_nequip."))}
    assert named == present


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
def test_both_adapters_have_the_same_modules(package: str) -> None:
    present = {path.stem if path.is_file() else path.name for path in (ROOT / package).iterdir()}
    assert [module for module in SHARED if module not in present] == []


def test_hooks_stand_on_top() -> None:
    """Nothing but a command, an adapter and the package itself knows that the framework is patched."""
    allowed = {"gaq_mace.adapter", "gaq_mace.commands", "gaq_nequip", "gaq_nequip.adapter", "gaq_nequip.builder"}
    users = {
        name
        for name, targets in arrows().items()
        if ".hook" not in name and any(".hook" in target for target in targets)
    }
    assert users <= allowed


DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]


def _names_in(body: list[ast.stmt]) -> set[str]:
    """Names that statements define or import, those under ``if`` and ``try`` too."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            names |= _names_in(node.body) | _names_in(node.orelse)
            names |= {name for handler in getattr(node, "handlers", []) for name in _names_in(handler.body)}
    return names


@cache
def _public(package: str) -> frozenset[str]:
    """What a package offers by lazy import: the keys of its ``_PUBLIC``."""
    for node in _tree(package).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_PUBLIC":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


@cache
def _defined(module: str) -> frozenset[str]:
    """Names that a module defines, imports or offers by lazy import, and ``Class.name`` for what its classes define."""
    body = _tree(module).body
    members = {
        f"{node.name}.{member}" for node in body if isinstance(node, ast.ClassDef) for member in _names_in(node.body)
    }
    return frozenset(_names_in(body) | members | _public(module))


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, something that one defines, or a method or attribute of a class there."""
    if name in modules():
        return True
    parts = name.split(".")
    candidates = ((".".join(parts[:i]), ".".join(parts[i:])) for i in (len(parts) - 1, len(parts) - 2))
    return any(module in modules() and attribute in _defined(module) for module, attribute in candidates)


def test_a_name_that_does_not_exist_is_detected() -> None:
    assert _exists("gaq.model.insertion.Host.insert")
    assert _exists("gaq_mace.load")
    assert not _exists("gaq.model.insertion.Host.inserted")
    assert not _exists("gaq.model.insertions")


# Entry point groups, which begin like a module.
NOT_MODULES = {"gaq.adapters"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_the_documents_are_those_of_the_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = set(re.findall(r"`(gaq(?:_mace|_nequip)?(?:\.\w+)+)(?:\(.*?\))?`", text)) - NOT_MODULES
    assert [name for name in sorted(names) if not _exists(name)] == []
    files = set(
        re.findall(r"`((?:gaq|gaq_mace|gaq_nequip|benchmarks|configs|docs|examples|tests|tools)/[\w./]+)`", text)
    )
    assert [name for name in sorted(files) if "NAME" not in name and not (ROOT / name).exists()] == []
