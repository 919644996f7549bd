"""What Sphinx does to a page before it parses it: generated parts in place, comments for the tests of blocks removed."""

from __future__ import annotations

import re
from typing import Any

import reference

__all__ = ["prepared", "setup"]

GENERATED = re.compile(r"^```\{generated\} ([\w-]+)\n.*?^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE)


def prepared(text: str) -> str:
    """Return a page with its generated parts, and without HTML comments."""
    text = COMMENT.sub("", text)
    return GENERATED.sub(lambda match: reference.PAGES[match[1]](), text)


def _read(app: Any, docname: str, source: list[str]) -> None:
    if str(app.env.doc2path(docname)).endswith(".md"):
        source[0] = prepared(source[0])


def _generated(app: Any, *others: Any) -> list[str]:
    """Pages with generated parts are read anew in every build: the code may have changed."""
    return [name for name in app.env.found_docs if GENERATED.search(app.env.doc2path(name).read_text("utf-8"))]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", _read)
    app.connect("env-get-outdated", _generated)
    return {"parallel_read_safe": True}
