"""Builds the CPU kernels on installation, and the package's description. The rest stands in pyproject.toml."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from gaq.kernels.cpu import variants


class BuildWithKernels(build_py):
    """Adds the libraries to what is installed. An installation from which one develops compiles on first use."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            print(f"gaq: {variants.build_all(Path(self.build_lib) / 'gaq' / 'kernels' / 'cpu' / variants.FOLDER.name)}")


class WheelWithKernels(bdist_wheel):
    """A wheel for one kind of machine, and for every version of Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not (sys.platform.startswith("linux") and platform.machine() == "x86_64")

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def description() -> str:
    """README for where it stands without the repository: links to its files name them instead, figures are left out."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^(!\[.*\]\((?!http).*\)|<!--.*-->)\n+", "", text, flags=re.MULTILINE)

    def place(match: re.Match[str]) -> str:
        name, target = match[1], match[2].partition("#")[0]
        return f"`{target}`" if name == target else f"{name} (`{target}`)"

    return re.sub(r"\[([^\]]+)\]\((?!http|#)([^)\s]+)\)", place, text)


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelWithKernels},
        long_description=description(),
        long_description_content_type="text/markdown",
    )
