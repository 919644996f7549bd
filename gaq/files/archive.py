"""Smaller archives of torch's."""

from __future__ import annotations

import io
import pickletools
import tokenize
import zipfile
from pathlib import Path

__all__ = ["bare_source", "deflate"]

_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def bare_source(source: str) -> str:
    """Python source without comments and docstrings: the same code at the same lines.

    Args:
        source: of a module.

    Returns:
        Source of as many lines. Where there was a docstring there is an empty one.
    """
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    cuts = []
    starts_statement = True
    for i, token in enumerate(tokens):
        if token.type == tokenize.COMMENT:
            cuts.append((token.start, token.end, ""))
            continue
        following = next((t.type for t in tokens[i + 1 :] if t.type != tokenize.COMMENT), None)
        if token.type == tokenize.STRING and starts_statement and following == tokenize.NEWLINE:
            cuts.append((token.start, token.end, '""'))
        starts_statement = token.type in _LAYOUT and (starts_statement or token.type != tokenize.NL)
    for (row, column), (end_row, end_column), instead in reversed(cuts):
        tail = lines[end_row - 1][end_column:]
        kept = lines[row - 1][:column] + instead
        if end_row == row:
            lines[row - 1] = (kept.rstrip() if not tail.strip() else kept) + tail
            continue
        lines[row - 1] = kept + "\n"
        lines[row : end_row - 1] = ["\n"] * (end_row - 1 - row)
        lines[end_row - 1] = tail.lstrip() or "\n"
    return "".join(lines)


def deflate(source: Path, target: Path) -> None:
    """Compress the entries of an archive of torch's, which reads them either way.

    Pickles lose what they note down and never refer to, half of what a module of many small parts comes to; our own
    modules, which packages hold a copy of, lose comments and docstrings.

    Args:
        source: archive, of `torch.save` or a package.
        target: file to write, which may be `source`.
    """
    with zipfile.ZipFile(source) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in entries:
            if name.endswith(".pkl"):
                content = pickletools.optimize(content)
            elif name.endswith(".py") and _is_own(name):
                content = bare_source(content.decode()).encode()
            archive.writestr(name, content)


def _is_own(name: str) -> bool:
    """Whether an entry, below the folder that all entries are in, is of one of our packages."""
    return name.partition("/")[2].split("/")[0] in ("gaq", "gaq_mace", "gaq_nequip")
