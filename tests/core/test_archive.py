"""Archives of torch's, compressed."""

from __future__ import annotations

import ast
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

import gaq
from gaq.files.archive import bare_source, deflate

ROOT = Path(gaq.__file__).parent.parent
MODULES = sorted(p for package in ("gaq", "gaq_nequip") for p in (ROOT / package).rglob("*.py"))


def test_what_is_in_an_archive_stays(tmp_path: Path) -> None:
    path, target = tmp_path / "plain.pt", tmp_path / "small.pt"
    state = {f"layer.{i}": [torch.arange(4) + i, {"name": str(i)}] for i in range(200)}
    torch.save(state, path)
    deflate(path, target)
    loaded = torch.load(target)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k][0], v[0]) and loaded[k][1] == v[1] for k, v in state.items())
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(target) as after:
        assert before.namelist() == after.namelist()
        pickled = next(name for name in after.namelist() if name.endswith(".pkl"))
        # Not only compressed: memo entries that nothing refers to are gone.
        assert after.getinfo(pickled).file_size < 0.9 * before.getinfo(pickled).file_size
    assert target.stat().st_size < 0.6 * path.stat().st_size
    deflate(path, path)
    assert torch.load(path).keys() == state.keys()


def test_codes_of_weights_get_the_strategy_that_suits_them(tmp_path: Path) -> None:
    """Codes with no repetitions but by chance, and rows that repeat, each with its best strategy."""
    path, target = tmp_path / "plain.pt", tmp_path / "small.pt"
    generator = torch.Generator().manual_seed(0)
    codes = (8 * torch.randn(40_000, generator=generator)).to(torch.int8)
    rows = codes[:64].repeat(500)
    torch.save({"codes": codes, "rows": rows}, path)
    deflate(path, target)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        sizes = [info.compress_size for info in archive.infolist() if "/data/" in info.filename]
    level_nine = [len(zlib.compress(values.numpy().tobytes(), 9)) for values in (codes, rows)]
    assert sizes[0] < 0.97 * level_nine[0]
    assert sizes[1] <= level_nine[1]
    loaded = torch.load(target)
    assert torch.equal(loaded["codes"], codes)
    assert torch.equal(loaded["rows"], rows)


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            for statement in statements if isinstance(statements, list) else []:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    statement.value = ast.Constant("" if isinstance(text, str) else text)
    return ast.dump(tree)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_without_comments_is_the_same_code(path: Path) -> None:
    source = path.read_text()
    bare = bare_source(source)
    assert _without_docstrings(bare) == _without_docstrings(source)
    # Line numbers in tracebacks are those of the source.
    before, after = (
        [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)] for text in (source, bare)
    )
    assert before == after
    assert len(source.splitlines()) == len(bare.splitlines())


def test_all_kinds_of_strings_and_comments() -> None:
    source = (
        '"""Module."""\n'
        "# a comment\n"
        "x = 1  # beside code\n"
        'y = """not a\n'
        '# docstring"""\n'
        "def f():\n"
        '    r"""Long,\n'
        "\n"
        '    raw."""  # and a comment\n'
        "    return '# no comment'\n"
        "x = [  # of a list\n"
        "    'text',\n"
        "    # inside\n"
        "]\n"
        '"""About x."""\n'
        "if x: 'alone'\n"
    )
    assert bare_source(source) == (
        '""\n\nx = 1\ny = """not a\n# docstring"""\ndef f():\n    ""\n\n\n    return \'# no comment\'\nx = [\n'
        "    'text',\n\n]\n\"\"\nif x: 'alone'\n"
    )


def test_own_modules_alone_lose_comments(tmp_path: Path) -> None:
    text = '"""What it is for."""\nx = 1  # one\n'
    with zipfile.ZipFile(tmp_path / "before.zip", "w") as archive:
        for name in ("root/gaq/a.py", "root/nequip/gaq/a.py", "root/gaqother/a.py", "root/gaq/a.txt"):
            archive.writestr(name, text)
    deflate(tmp_path / "before.zip", tmp_path / "after.zip")
    with zipfile.ZipFile(tmp_path / "after.zip") as archive:
        contents = {name: archive.read(name).decode() for name in archive.namelist()}
    assert contents.pop("root/gaq/a.py") == '""\nx = 1\n'
    assert len(contents) == 3
    assert set(contents.values()) == {text}
