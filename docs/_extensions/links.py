"""Checks the links within the built site: pages, anchors, images and files.

python docs/_extensions/links.py build/docs
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["broken", "main"]


class _Page(HTMLParser):
    """The anchors of a page and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors, self.targets = {"", "top"}, list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.targets.append(value)


def broken(site: Path) -> list[str]:
    """Return every link of a built site that leads to no file or no anchor, with its page."""
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            missing = not other.exists() or (other in pages and unquote(parts.fragment) not in pages[other].anchors)
            if missing:
                found.append(f"{path.relative_to(site.resolve())}: {target}")
    return found


def main() -> int:
    """Print the broken links of the site given on the command line; returns the exit code."""
    found = broken(Path(sys.argv[1]))
    print("\n".join(found) if found else "all links within the site lead somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
