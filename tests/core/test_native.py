"""Building the C++ sources: the tests of what they compute are skipped where they cannot be built."""

from __future__ import annotations

import os
import shutil

import pytest

from gaq.kernels.cpu import native


@pytest.mark.skipif("CXX" in os.environ or shutil.which("g++") is None, reason="needs g++, and CXX not set")
@pytest.mark.smoke
def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    assert native.why_not() is None
