"""What Sphinx does to a page before it parses it: puts generated parts in place, and takes comments out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import reference

__all__ = ["prepared", "setup"]

GENERATED = re.compile(r"^```\{generated\} ([\w-]+)\n.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)")
DOCS = Path(__file__).parents[1]
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE)


def prepared(text: str, folder: Path) -> str:
    """Return a page with its generated parts, and without HTML comments.

    Links to folders, and to pages outside ``docs``, name their place in the repository instead.

    Args:
        text: the page, in Markdown.
        folder: where it lies.
    """
    text = GENERATED.sub(lambda match: reference.PAGES[match[1]](), COMMENT.sub("", text))

    def link(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        outside = target.is_dir() or (target.suffix == ".md" and not target.is_relative_to(DOCS))
        if match[2].startswith("http") or not target.exists() or not outside:
            return match[0]
        place = target.relative_to(reference.ROOT).as_posix()
        return f"`{place}`" if place.rstrip("/") == match[1].rstrip("/") else f"{match[1]} (`{place}`)"

    return LINK.sub(link, text)


def _read(app: Any, docname: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        source[0] = prepared(source[0], path.parent)


def _generated(app: Any, *others: Any) -> list[str]:
    """Pages with generated parts are read anew in every build: the code may have changed."""
    return [name for name in app.env.found_docs if GENERATED.search(app.env.doc2path(name).read_text("utf-8"))]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    app.connect("env-get-outdated", _generated)
    return {"parallel_read_safe": True}
