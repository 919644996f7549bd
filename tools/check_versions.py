#!/usr/bin/env python3
"""Test given, oldest or newest versions of Python, torch, MACE and NequIP, and print a table of what broke.

    python tools/check_versions.py                                   # the supported range: both ends, both frameworks
    python tools/check_versions.py newest --framework mace --tests all
    python tools/check_versions.py --python 3.13 --torch 2.15.0      # a release of torch
    python tools/check_versions.py --mace newest                     # a release of MACE, beyond the bound of pyproject

``pyproject.toml`` has the supported range. ``oldest`` is the lowest Python of ``requires-python`` with the lowest
version of every dependency that names one; ``newest`` is the highest Python of the classifiers with the versions that
pip picks. Each end gets one environment in a temporary folder. The frameworks are installed in it one after the
other, so that torch (several GB in a CUDA build) is downloaded once. Nothing outside that folder is changed.

An environment is "not tested" if there is no such Python, or if a download failed or took too long. It is "broken" if
its versions exclude each other, or if its tests fail.

Exit codes: 0 all tested and passed, 1 something is broken, 2 bad input, 3 something was not tested (0 with
``--allow-untested``).
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]
HOSTS = {"mace": "mace-torch", "nequip": "nequip"}
# Distributions that only one of the two frameworks brings, removed before the other is installed.
OF_FRAMEWORK = {"mace": ["mace-torch"], "nequip": ["nequip", "nequip-allegro"]}
EXTRAS = {"mace": ["mace"], "nequip": ["nequip", "allegro"]}
TEST_EXTRAS = ["report", "dev"]
SHOWN = ("torch", "e3nn", "numpy", "ase")
# Output of pip when a download failed; any other failure is a conflict of versions or a failed build.
NETWORK = re.compile(
    r"ConnectionError|NewConnectionError|ConnectTimeout|Read timed out|ReadTimeoutError|Connection broken|Retrying \(|"
    r"Temporary failure in name resolution|IncompleteRead|No space left on device|Network is unreachable"
)


class Untested(Exception):
    """The environment could not be made, for a reason that is not the versions."""


class Broken(Exception):
    """The environment cannot be made with these versions."""


@dataclass
class Plan:
    """An environment to test in."""

    label: str
    python: str
    constraints: dict[str, list[str]] = field(default_factory=dict)  # constraints for pip, by framework
    requested: dict[str, str] = field(default_factory=dict)  # version beyond the bound of pyproject, by framework


@dataclass
class Result:
    """A row of the table."""

    label: str
    framework: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    outcome: str = ""  # passed, broken, not tested
    note: str = ""
    failures: list[str] = field(default_factory=list)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def lowest_python(settings: dict[str, Any]) -> str:
    return re.search(r">=\s*([\d.]+)", settings["requires-python"])[1]


def highest_python(settings: dict[str, Any]) -> str:
    versions = [m[1] for line in settings["classifiers"] if (m := re.search(r"Python :: (3\.\d+)$", line))]
    return max(versions, key=lambda version: int(version.split(".")[1]))


def floors(settings: dict[str, Any], framework: str) -> list[str]:
    """``name==lowest`` for every dependency with a lower bound, including those of the framework and the report."""
    extras = settings["optional-dependencies"]
    lowest: dict[str, str] = {}
    # Extras come after the core, since they may ask for a higher version.
    for line in [
        *settings["dependencies"],
        *(line for name in (*EXTRAS[framework], "report") for line in extras[name]),
    ]:
        match = re.match(r"([\w.-]+).*?>=\s*([\w.]+)", line.split(";")[0])
        if match:
            lowest[match[1]] = match[2]
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


def interpreter(version: str) -> str:
    """Path of a Python of this version: the running one, one on PATH, or one of pyenv."""
    root = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    pyenv = sorted(glob.glob(f"{root}/versions/{version}*/bin/python"))
    for candidate in [sys.executable, shutil.which(f"python{version}"), *pyenv]:
        if not candidate:
            continue
        code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
        asked = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if asked.returncode == 0 and f"{asked.stdout.strip()}.".startswith(f"{version}."):
            return candidate
    raise Untested(f"there is no Python {version} here; install it, or give another with --python")


def run(command: Sequence[str], log: Path, deadline: float, **environment: str) -> int | None:
    """Run a command with its output in a file; return its exit code, or None if it was stopped at the deadline."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def pip(python: Path, what: Sequence[str], log: Path, deadline: float) -> None:
    """Install with the constraints of the plan only, since those of the machine could make "newest" older."""
    start = log.stat().st_size if log.exists() else 0
    constraints = str(python.parents[1] / "constraints.txt")
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *what]
    code = run(command, log, deadline, PIP_CONSTRAINT=constraints)
    if code == 0:
        return
    printed = log.read_text(encoding="utf-8", errors="replace")[start:]
    if code is None:
        raise Untested(f"pip install {' '.join(what)}: out of time; the download is slow or hangs")
    if NETWORK.search(printed):
        raise Untested(f"pip install {' '.join(what)}: the download failed")
    errors = [line for line in printed.splitlines() if line.startswith("ERROR:")] or printed.splitlines()[-1:]
    raise Broken(f"pip install: {errors[0].removeprefix('ERROR: ')}")


def constrain(plan: Plan, framework: str, folder: Path) -> None:
    lines = plan.constraints.get(framework, [])
    (folder / "constraints.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make(plan: Plan, framework: str, folder: Path, log: Path, deadline: float) -> Path:
    """Make the environment, with torch for the first framework, and return the path of its Python."""
    base = interpreter(plan.python)
    if run([base, "-m", "venv", str(folder)], log, deadline) != 0:
        raise Untested(f"{base} -m venv fails; see {log}")
    constrain(plan, framework, folder)
    python = folder / "bin" / "python"
    pip(python, ["-q", "--upgrade", "pip"], log, deadline)
    pip(python, ["torch"], log, deadline)
    return python


def install(plan: Plan, framework: str, python: Path, log: Path, deadline: float) -> dict[str, str]:
    """Install a framework and this package into the environment, and return its versions."""
    constrain(plan, framework, python.parents[1])
    others = [name for key, names in OF_FRAMEWORK.items() if key != framework for name in names]
    run([str(python), "-m", "pip", "uninstall", "-q", "-y", *others], log, deadline)
    requested = plan.requested.get(framework)
    if requested is None:
        pip(python, [f"{ROOT}[{','.join([*EXTRAS[framework], *TEST_EXTRAS])}]"], log, deadline)
    else:
        # Without our extra, whose bound may exclude the requested version.
        host = HOSTS[framework] + ("" if requested == "newest" else f"=={requested}")
        more = ["nequip-allegro"] if framework == "nequip" else []
        pip(python, ["--upgrade", f"{ROOT}[{','.join(TEST_EXTRAS)}]", host, *more], log, deadline)
    names = [*SHOWN, HOSTS[framework]]
    code = f"import sys, importlib.metadata as m; print(sys.version.split()[0], *map(m.version, {names!r}))"
    asked = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(["python", *names], asked.stdout.split(), strict=True))


def test(python: Path, arguments: Sequence[str], log: Path, deadline: float) -> tuple[str, str, list[str]]:
    """Run the tests; return outcome, note and failures."""
    record = log.with_suffix(".xml")
    command = [str(python), "-m", "pytest", *arguments, f"--junitxml={record}"]
    code = run(command, log, deadline, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    if code is None:
        return "not tested", "the tests did not end in time", []
    if code not in (0, 1) or not record.exists():
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
        return "broken", f"pytest could not run the tests (exit code {code}): {' '.join(last)}", []
    suite = ElementTree.parse(record).getroot().find("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failures = []
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            if (problem := case.find(kind)) is not None:
                first = (problem.get("message", "").splitlines() or [""])[0]
                failures.append(f"{case.get('classname')}.{case.get('name')}: {first[:200]}")
    bad = count["failures"] + count["errors"]
    passed = count["tests"] - bad - count["skipped"]
    note = f"{passed} passed, {bad} failed, {count['skipped']} skipped in {float(suite.get('time', 0)) / 60:.1f} min"
    return ("broken" if bad or not passed else "passed"), note, failures


def check(
    plan: Plan, frameworks: Sequence[str], arguments: argparse.Namespace, folder: Path, deadline: float
) -> list[Result]:
    """Make the environment of a plan and test each framework in it."""
    results = [Result(plan.label, framework, plan.python) for framework in frameworks]
    place = folder / plan.label
    log = folder / f"{plan.label}_install.log"
    selection = ["-m", "smoke"] if arguments.tests == "smoke" else []

    def limit(minutes: float) -> float:
        return min(deadline, time.monotonic() + 60 * minutes)

    try:
        python = make(plan, frameworks[0], place, log, limit(arguments.install_minutes))
        for result in results:
            print(f"== {plan.label}: {result.framework}", flush=True)
            try:
                result.versions = install(plan, result.framework, python, log, limit(arguments.install_minutes))
                tests = folder / f"{plan.label}_{result.framework}_tests.log"
                result.outcome, result.note, result.failures = test(
                    python, selection, tests, limit(arguments.test_minutes)
                )
            except Broken as error:
                result.outcome, result.note = "broken", str(error)
    except (Broken, Untested) as error:
        for result in results:
            if not result.outcome:
                result.outcome = "broken" if isinstance(error, Broken) else "not tested"
                result.note = str(error)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return results


def table(results: Sequence[Result]) -> str:
    head = ["environment", "python", *SHOWN, "framework", "outcome", "tests"]
    rows = [head]
    for result in results:
        host = HOSTS[result.framework]
        versions = result.versions
        rows.append(
            [
                result.label,
                versions.get("python", result.python),
                *(versions.get(name, "-") for name in SHOWN),
                f"{host} {versions.get(host, '-')}",
                result.outcome,
                result.note,
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for result in results:
        lines += [f"{result.label}, {result.framework}: {failure}" for failure in result.failures]
    return "\n".join(lines)


def plans(arguments: argparse.Namespace) -> list[Plan]:
    settings = project()
    requested = {name: value for name in HOSTS if (value := getattr(arguments, name)) is not None}
    if arguments.python or arguments.torch or requested:
        if arguments.ends:
            raise SystemExit("check_versions: give oldest or newest, or versions; not both")
        torch = arguments.torch
        constraints = {} if torch in (None, "newest") else {name: [f"torch=={torch}"] for name in HOSTS}
        return [Plan("given", arguments.python or highest_python(settings), constraints, requested)]
    both = {
        "newest": Plan("newest", highest_python(settings)),
        "oldest": Plan("oldest", lowest_python(settings), {name: floors(settings, name) for name in HOSTS}),
    }
    return [both[end] for end in arguments.ends or both]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ends", nargs="*", metavar="END", help="newest and oldest (the default), or one of them")
    parser.add_argument("--framework", choices=list(HOSTS), help="default: one after the other")
    parser.add_argument("--python", metavar="X.Y", help="default: the highest supported")
    for name in ("torch", *HOSTS):
        parser.add_argument(f"--{name}", metavar="VERSION", help="a version, or newest")
    parser.add_argument(
        "--tests", choices=["smoke", "all"], default="smoke", help="tests marked smoke, or all fast ones"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="for everything; what does not fit is not tested")
    parser.add_argument("--install-minutes", type=float, default=30.0, help="for making one environment")
    parser.add_argument("--test-minutes", type=float, default=60.0, help="for one run of the tests")
    parser.add_argument("--allow-untested", action="store_true", help="exit with 0 if nothing is broken")
    parser.add_argument("--logs", type=Path, help="folder to keep the logs in")
    arguments = parser.parse_args(argv)
    for end in arguments.ends:
        if end not in ("oldest", "newest"):
            parser.error(f"{end}: give newest, oldest, or nothing for both")
    deadline = time.monotonic() + 60 * arguments.minutes
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gaq_versions_") as name:
        folder = Path(name)
        for plan in plans(arguments):
            frameworks = [arguments.framework] if arguments.framework else list(plan.requested or HOSTS)
            results += check(plan, frameworks, arguments, folder, deadline)
        if arguments.logs is not None:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.glob("*.log"):
                shutil.copy(log, arguments.logs)
    print(table(results))
    if any(result.outcome == "broken" for result in results):
        return 1
    if any(result.outcome == "not tested" for result in results):
        return 0 if arguments.allow_untested else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
