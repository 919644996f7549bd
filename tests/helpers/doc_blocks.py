"""Fenced blocks of README and docs: collects them, tells which environment they belong to, and runs them.

HTML comments right before the fence say what a document has to say of a block:

    <!-- environment: mace -->       mace or nequip; default: the page's, that of its name, or both
    <!-- not run: needs a GPU -->    the block is not run, and why; only its options are checked
    <!-- needs: ipi>=3 openmmml -->  distributions without which the block is skipped, and this reason printed
    <!-- file: tutorial/mace.yml --> the reader saves the block under this name
    <!-- output -->                  the block shows what the one before it prints; its numbers are examples

    <!-- page: mace -->              at the top of a page: the environment of its blocks
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ("mace", "nequip")
LANGUAGES = ("bash", "python", "yaml", "text")
COMMENT = re.compile(r"<!-- (environment|not run|needs|file|output|page)(?:: (.+))? -->")
FILE = re.compile(r"[\w./-]+\.(?:model(?:-[\w.]+)?|ckpt|safetensors|gaq|nequip\.zip|nequip\.pt2|lmp\.pt|xyz)(?![\w.])")

STEPS = "distillation: {steps: 20}"
SHORTER = (
    ("quickstart_mace.py", "quickstart_mace.py --quick"),
    ("quickstart_nequip.py", "quickstart_nequip.py --quick"),
    ("gaq quantize ", f"gaq quantize --config '{{preset: gaq, {STEPS}}}' "),
    (" --nve-ps 1", ""),  # in README; the next line shortens it further
    ("gaq report ", "gaq report --nve-ps 0.02 "),
    ('gaq.prepare(model, "gaq")', 'gaq.prepare(model, {"preset": "gaq", "distillation": {"steps": 20}})'),
)
"""Commands and their replacements that take seconds, by options that README or docs name."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        document: path relative to the repository.
        line: of the opening fence, from 1.
        heading: the heading it stands under.
        language: of the fence; empty if it names none.
        text: between the fences.
        environment: ``mace`` or ``nequip``; None for both.
        not_run: why it is not run; None if it is.
        needs: requirements that no environment of `.ci/run` has to meet, such as ``ipi>=3``; empty for most blocks.
        file: the name under which the reader saves the block; None for most blocks.
        is_output: whether it shows what the block before it prints.
    """

    document: str
    line: int
    heading: str
    language: str
    text: str
    environment: str | None
    not_run: str | None
    needs: tuple[str, ...] = ()
    file: str | None = None
    is_output: bool = False

    def __str__(self) -> str:
        return f"{self.document}:{self.line} ({self.language or 'no language'})"

    @property
    def runs(self) -> bool:
        """Whether something happens when the reader follows it: commands, code, or a file that is saved."""
        return self.not_run is None and (self.language in ("bash", "python") or self.file is not None)

    @property
    def missing(self) -> list[str]:
        """Requirements of `needs` that are not met here."""
        return [text for text in self.needs if not is_met(text)]


def documents() -> list[Path]:
    """The users' pages, whose blocks are run: README and docs, in the order in which they are read."""
    folders = (ROOT / "docs", ROOT / "docs" / "tutorials", ROOT / "docs" / "reference")
    return [ROOT / "README.md", *(path for folder in folders for path in sorted(folder.glob("*.md")))]


def pages() -> list[Path]:
    """Every page: the users', and those for developers."""
    return [*documents(), ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "dev").glob("*.md"))]


def blocks_of(path: Path) -> Iterator[Block]:
    """The fenced blocks of a document, from its top down.

    Raises:
        ValueError: for a fence that is never closed.
    """
    document = path.relative_to(ROOT).as_posix()
    heading, comments, lines = "", dict[str, str](), path.read_text().splitlines()
    page, at = path.stem if path.stem in ENVIRONMENTS else None, 0
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith("```"):
            indent = len(line) - len(line.lstrip())
            end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == "```"), None)
            if end is None:
                raise ValueError(f"{document}:{at + 1}: this fence is never closed")
            text = "".join(f"{line[indent:]}\n" for line in lines[at + 1 : end])
            if not line.strip("` ").startswith("{"):  # a directive of Sphinx
                yield Block(
                    document,
                    at + 1,
                    heading,
                    line.strip("` "),
                    text,
                    comments.get("environment", page),
                    comments.get("not run"),
                    tuple(comments.get("needs", "").split()),
                    comments.get("file"),
                    "output" in comments,
                )
            comments, at = {}, end + 1
            continue
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if (comment := COMMENT.fullmatch(line.strip())) is not None:
            comments[comment[1]] = comment[2] or ""
            page = comments.pop("page", page)
        elif line.strip() and not line.strip().startswith("<!--"):
            comments = {}
        at += 1


def all_blocks() -> list[Block]:
    """Every block of README and docs, in order."""
    return [block for path in documents() for block in blocks_of(path)]


def installed() -> list[str]:
    """Environments whose framework can be imported here; one, as MACE and NequIP need different versions of e3nn."""
    return [name for name in ENVIRONMENTS if find_spec(name) is not None]


def is_met(requirement: str) -> bool:
    """Whether a distribution is installed, in a version that the requirement allows."""
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(version(wanted.name), prereleases=True)
    except PackageNotFoundError:
        return False


def shortened(text: str) -> str:
    """The text with long commands shortened by the options of `SHORTER`."""
    for command, shorter in SHORTER:
        text = text.replace(command, shorter)
    return text


def files_named(text: str) -> list[str]:
    """Model files, structures and report folders that a block names, its comments included, in order."""
    return list(dict.fromkeys(FILE.findall(text) + re.findall(r"-o ([\w/-]+)/(?=\s|$)", text)))


def commands_of(block: Block) -> list[tuple[str, ...]]:
    """The commands to run for a block: one for Python, one for each line of a shell, each in a new shell.

    Tutorials are followed to the letter.
    """
    text = block.text if block.document.startswith("docs/tutorials/") else shortened(block.text)
    if block.language == "python":
        return [(sys.executable, "-c", text)]
    lines = (line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines())
    return [("bash", "-euo", "pipefail", "-c", line) for line in lines if line and not line.startswith("#")]


@dataclass
class Done:
    """The result of running a block, or one of its commands.

    Attributes:
        code: exit code.
        output: text of both streams.
        made: the named paths that it wrote or changed, relative to the folder.
    """

    code: int
    output: str
    made: list[str]


class Workspace:
    """A folder in which the blocks of one environment are run, each after the blocks before it in its document.

    It has the folders of the repository that commands name, and the quickstart's models and structures under the names
    that the text uses. Its ``pip`` installs nothing, since all extras are installed already. It notes what it was asked
    to install; `check_extras` of the tests compares that with ``.ci/run``.
    """

    def __init__(self, folder: Path, environment: str) -> None:
        self.folder = folder
        self.environment = environment
        self.done: dict[Block, Done] = {}
        # A command that occurs in two documents is run once.
        self.finished: dict[tuple[str, ...], Done] = {}
        self.blocks = [
            block
            for block in all_blocks()
            if block.runs and not block.missing and block.environment in (None, environment)
        ]
        for name in ("examples", "benchmarks", "configs"):
            (folder / name).symlink_to(ROOT / name)
        commands = folder / ".bin"
        commands.mkdir()
        (commands / "pip").write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/../pip.log"\n')
        (commands / "pip").chmod(0o755)
        path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self.variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}

    def execute(self, arguments: list[str], timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder; the result's ``stdout`` has both streams."""
        return subprocess.run(
            arguments,
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
        )

    def run(self, block: Block) -> Done:
        """Run a block, once, after the blocks before it in its document and the quickstart of this environment."""
        if block in self.done:
            return self.done[block]
        quickstart = next(b for b in self.blocks if f"quickstart_{self.environment}.py" in b.text)
        if block is not quickstart:
            self.run(quickstart)
            for earlier in self.blocks:
                if earlier.document == block.document and earlier.line < block.line:
                    self.run(earlier)
        done = Done(0, "", [])
        if block.file is not None:
            (self.folder / block.file).parent.mkdir(exist_ok=True)
            (self.folder / block.file).write_text(block.text)
        for command in commands_of(block) if block.file is None else []:
            if command not in self.finished:
                self.finished[command] = self._finish(command, files_named(block.text))
            result = self.finished[command]
            done = Done(result.code, done.output + result.output, [*done.made, *result.made])
            if done.code != 0:
                break
        self.done[block] = done
        if block is quickstart and done.code == 0:
            self._name_models()
        return done

    def _finish(self, command: tuple[str, ...], names: list[str]) -> Done:
        """Run a command, and note which of the named files it writes or changes."""
        before = {name: self._changed(name) for name in names}
        finished = self.execute(list(command))
        made = [name for name in names if self._changed(name) not in (None, before[name])]
        return Done(finished.returncode, finished.stdout, made)

    def _changed(self, name: str) -> int | None:
        path = self.folder / name
        if not path.exists():
            return None
        newest = [path.stat().st_mtime_ns, *(file.stat().st_mtime_ns for file in path.rglob("*"))]
        return max(newest)

    def _name_models(self) -> None:
        """Copy the quickstart's data and models to the names that the text uses for the reader's."""
        if self.environment == "mace":
            made = self.folder / "quickstart"
            shutil.copy(made / "fp32.model", self.folder / "MACE.model")
        else:
            made = self.folder / "quickstart" / "nequip"
            shutil.copy(made / "fp32" / "best.ckpt", self.folder / "MODEL.ckpt")
            shutil.copytree(made / "gaq", self.folder / "RUN")
            # Checkpoints look for their training data by a path relative to the folder where training started.
            shutil.copy(made / "train.xyz", self.folder / "train.xyz")
            done = self.execute(["nequip-package", "build", "MODEL.ckpt", "MODEL.nequip.zip"])
            assert done.returncode == 0, done.stdout
            overrides = (
                "trainer.max_epochs=1 run=[train] quantization={preset:gaq,distillation:{steps:5}} "
                "training_module.model.l_max=1 training_module.model.num_layers=1"
            )
            done = self.execute(["nequip-train", "--config-dir", "configs", "-cn", "allegro_gaq", *overrides.split()])
            assert done.returncode == 0, done.stdout
            shutil.copy(made / "allegro_gaq" / "best.ckpt", self.folder / "ALLEGRO_gaq.ckpt")
        shutil.copy(made / "train.xyz", self.folder / "structures.xyz")
        shutil.copy(made / "test.xyz", self.folder / "test.xyz")
