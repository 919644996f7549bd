"""The version is stated in `gaq.__version__`; what repeats it for others agrees."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import yaml

import gaq

ROOT = Path(__file__).parents[2]


def test_the_installed_package_has_it() -> None:
    assert metadata.version("gaq") == gaq.__version__


def test_the_citation_has_it() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == gaq.__version__


def test_the_changelog_begins_with_it_and_dates_it() -> None:
    """Above it may stand what is not released yet."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [h for h in re.findall(r"^## (.+)$", text, flags=re.MULTILINE) if h != "Unreleased"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in headings)
    version, released = headings[0].split(" - ")
    assert version == gaq.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["date-released"]) == released
