"""How Sphinx builds the documentation: sphinx-build -W --keep-going -b html docs build/docs."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

import gaq  # noqa: E402

project = "GAQ"
author = "The GAQ developers"
copyright = "The GAQ developers, MIT licence"
release = version = gaq.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "pages"]
exclude_patterns = ["_*", "figures"]
suppress_warnings = ["config.cache"]

# Headings get the anchors that code hosts give them, so links work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
# The notebook is committed with its output; tests/docs/test_notebook.py runs it.
nb_execution_mode = "off"

# In docstrings, single backquotes name code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# The site is built where one framework is installed.
autodoc_mock_imports = ["nequip", "allegro", "openequivariance"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "GAQ"
html_static_path = ["_static"]
html_css_files = ["gaq.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

linkcheck_ignore = [r"https?://localhost"]
linkcheck_timeout = 20
