"""Compression of torch's archives."""

from __future__ import annotations

import io
import pickletools
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

__all__ = ["bare_source", "deflate"]

_COMPRESSOR = "_compressor"
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def bare_source(source: str) -> str:
    """Strip comments and docstrings from Python source; the code keeps its line numbers.

    Args:
        source: source of a module.

    Returns:
        Source with the same number of lines; docstrings become empty strings.
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
    for (row, column), (end_row, end_column), replacement in reversed(cuts):
        tail = lines[end_row - 1][end_column:]
        kept = lines[row - 1][:column] + replacement
        if end_row == row:
            lines[row - 1] = (kept.rstrip() if not tail.strip() else kept) + tail
            continue
        lines[row - 1] = kept + "\n"
        lines[row : end_row - 1] = ["\n"] * (end_row - 1 - row)
        lines[end_row - 1] = tail.lstrip() or "\n"
    return "".join(lines)


def deflate(source: Path, target: Path) -> None:
    """Compress the entries of one of torch's archives, which torch reads compressed or not.

    Pickles lose the memo entries that nothing refers to: half the pickle of a module with many small parts. Our
    modules, of which packages hold a copy, lose comments and docstrings.

    Args:
        source: archive from `torch.save` or a package.
        target: file to write; may be `source`.
    """
    with zipfile.ZipFile(source) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            if name.endswith(".pkl"):
                content = pickletools.optimize(content)
            elif name.endswith(".py") and _is_of_this_package(name):
                content = bare_source(content.decode()).encode()
            # The first time stamp that zip knows, so that equal models give equal files.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as stream:
                # zipfile offers levels only. Its stream has one attribute for the compressor, in all versions.
                setattr(stream, _COMPRESSOR, _deflater(best_strategy(content)))
                stream.write(content)


def best_strategy(content: bytes) -> int:
    """The strategy of zlib that makes the content smallest.

    Strings that occur twice in the codes of weights do so by chance: Huffman's code alone is 1 to 5 % smaller.
    """

    def size(strategy: int) -> int:
        compressor = _deflater(strategy)
        return len(compressor.compress(content)) + len(compressor.flush())

    return min((zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY), key=size)


def _deflater(strategy: int) -> Any:
    """A compressor of zip's format."""
    return zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)


def _is_of_this_package(name: str) -> bool:
    """Whether an entry, below the archive's top folder, belongs to one of our packages."""
    return name.partition("/")[2].split("/")[0] in ("gaq", "gaq_mace", "gaq_nequip")
