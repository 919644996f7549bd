"""README and docs hold: each block of a user's page is run, and does what the text promises.

    python -m pytest -m docs -n 0 tests/docs                    # all blocks of the environment this is called in
    python -m pytest -m docs -n 0 tests/docs -k mace.md         # those of one document
    python -m pytest -m docs -n 0 tests/docs -k "README.md:11"  # one block, after those it builds on

`.ci/run` does the first in both environments. Tests that run no command belong to the default suite.

A new block needs nothing here, with three exceptions. If it belongs to one environment, needs another program or cannot
be run, comments before it say so (see `doc_blocks`). If it promises an output, it gets a line in `PRINTED`. If it
writes a new kind of file, `check_file` gets a check for it. `doc_blocks.SHORTER` shortens long commands by options that
the text names.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from doc_blocks import (
    ENVIRONMENTS,
    LANGUAGES,
    ROOT,
    SHORTER,
    Block,
    Done,
    Workspace,
    all_blocks,
    documents,
    installed,
    pages,
    shortened,
)

from gaq.config.parse import PRESETS, parse_config

BLOCKS = all_blocks()
HERE = [block for block in BLOCKS if block.environment is None or block.environment in installed()]
RUN = [block for block in HERE if block.runs]
NOT_RUN = [block for block in HERE if block.not_run is not None]
YAML = [block for block in HERE if block.not_run is None and block.language == "yaml" and block.file is None]
OUTPUT = [block for block in HERE if block.is_output]

NOTEBOOK = ROOT / "docs" / "tutorials" / "dynamics.ipynb"

PRINTED = {
    "quickstart_mace.py": ("force MAE", "smaller", "LEE", "NVE drift", "comparison.json", "nve.png"),
    "quickstart_nequip.py": ("force MAE", "smaller", "LEE", "NVE drift", "comparison.json", "nve.png"),
    "gaq quantize": ("force_mae_ratio", "lee", "times smaller"),
    "gaq deploy": ("written: ",),
    "gaq report": ("force_mae_ratio", "lee", "central_difference", "report.html"),
    "gaq inspect": ("preset",),
    "gaq inspect MACE_gaq.model": ("int16", "total"),
    "gaq inspect MODEL_gaq.nequip.zip": ("int16", "total"),
    "gaq inspect MACE.gaq": ("a deployed model", "radial tables"),
    "gaq inspect MODEL.gaq": ("a deployed model", "radial tables"),
    "gaq doctor": ("versions", "hardware", "adapters", "hooks", "kernels"),
    "gaq.summary": ("int16", "total"),
    "nequip-deploy build": ("weights, float32", "codes and scales", "written: "),
    "nequip-deploy build --train-dir": ("largest force difference",),
    "nequip-deploy info": ("quantized, compiled", "gaq_preset", "weights bytes"),
    "gaq_mace_create_lammps_model": ("Kept of the quantization",),
    "VelocityVerlet": ("Etot[eV]",),
}
"""What a block that contains a command prints."""

FLOAT_OF = {
    "tutorial/quantized.model": "tutorial/fp32.model",
    "tutorial/w8.model": "tutorial/fp32.model",
    "tutorial/chn.model": "tutorial/many.model",
}
"""The float model of each model that a tutorial quantizes after training."""

WITHOUT_PACKAGE = """
import importlib.metadata as metadata, os, sys
# Hide this package: its entry points and its modules, as if it were not installed.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
real = metadata.entry_points
def entry_points(**keys):
    points = real(**keys)
    if keys.get("group") == "nequip.extension":
        points = metadata.EntryPoints(point for point in points if not point.value.startswith("gaq"))
    return points
metadata.entry_points = entry_points
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("gaq"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from ase.io import read

path = sys.argv[1]
if path.endswith(".model"):
    from mace.calculators import MACECalculator
    calculator = MACECalculator(model_paths=path, device="cpu", default_dtype="float32")
else:
    from nequip.integrations.ase import NequIPCalculator
    load = NequIPCalculator.from_compiled_model if path.endswith(".pt2") else NequIPCalculator._from_saved_model
    calculator = load(path, chemical_species_to_atom_type_map=True)
for atoms in read("test.xyz", ":"):
    atoms.calc = calculator
    print("FORCES", *atoms.get_forces().ravel())
assert not [name for name in sys.modules if name.split(".")[0].startswith("gaq")]
"""

pytestmark = pytest.mark.skipif(not installed(), reason="needs MACE or NequIP: pip install '.[mace]' or '.[nequip]'")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("documents"), installed()[0])


@pytest.fixture(scope="module")
def forces(workspace: Workspace) -> Callable[[str], np.ndarray]:
    """``forces(file)``: forces (components,) on ``test.xyz`` by the stock calculator, without this package."""
    forces_by_file: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in forces_by_file:
            done = workspace.execute([sys.executable, "-c", WITHOUT_PACKAGE, name])
            assert done.returncode == 0, done.stdout
            lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FORCES")]
            forces_by_file[name] = np.concatenate([np.array(line, dtype=float) for line in lines])
        return forces_by_file[name]

    return get


@pytest.fixture(autouse=True)
def unchanged_dtype() -> Iterator[None]:
    """Put torch's default dtype back, which MACE and NequIP set."""
    import torch

    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def check_file(workspace: Workspace, forces: Callable[[str], np.ndarray], name: str) -> None:
    """Check what the text promises of a file that a block has written, by its kind."""
    path = workspace.folder / name
    if path.is_dir():
        report = json.loads((path / "report.json").read_text())
        assert (path / "report.html").stat().st_size > 0
        assert {"model", "reference", "gates", "versions"} <= report.keys()
        assert not [key for key, gate in report["gates"].items() if gate["enforced"] and gate["passed"] is False]
        return
    assert path.stat().st_size > 0
    if name.endswith(".ckpt"):
        import gaq
        from gaq.model.state import state_of

        assert state_of(gaq.load(path)) is not None
    elif "lammps" in name and name.endswith(".nequip.pt2"):
        from gaq_nequip.deploy import artefact

        facts = artefact.metadata(path)
        assert facts["gaq_preset"] == "w8a16"
        assert facts["nequip_aoti_outputs"].split() == ["atomic_energy", "forces", "virial"]
    elif name.startswith("tutorial/") and name not in FLOAT_OF and name.endswith((".model", ".nequip.pt2")):
        assert np.isfinite(forces(name)).all()
    elif name.endswith((".model", ".nequip.zip", ".nequip.pt2")):
        float_forces = forces(FLOAT_OF.get(name, "MACE.model" if name.endswith(".model") else "MODEL.nequip.zip"))
        # A trained model comes from another training than the float model, and differs more.
        bound = 0.5 if "trained" in name else 0.02
        difference = forces(name) - float_forces
        assert np.sqrt(np.mean(difference**2)) < bound * np.sqrt(np.mean(float_forces**2))


def check_quickstart(workspace: Workspace, block: Block) -> None:
    """Check the quickstart: as accurate as FP32, 4 times smaller, equivariant, configurations one line apart."""
    folder = workspace.folder / ("quickstart" if workspace.environment == "mace" else "quickstart/nequip")
    table = json.loads((folder / "comparison.json").read_text())["models"]
    assert list(table) == ["fp32", "gaq"]
    assert np.isfinite([list(row.values()) for row in table.values()]).all()
    assert table["gaq"]["force_mae_mev_per_angstrom"] < 1.1 * table["fp32"]["force_mae_mev_per_angstrom"]
    assert table["gaq"]["size_ratio"] >= 4
    assert table["gaq"]["lee_mev_per_angstrom"] <= 0.15
    assert (folder / "nve.png").stat().st_size > 0
    suffix = "yml" if workspace.environment == "mace" else "yaml"
    stock, quantized = ((folder / f"{name}.{suffix}").read_text().splitlines() for name in table)
    assert set(stock) ^ set(quantized) == {"name: fp32", "name: gaq", "quantization: gaq"}


def check_dynamics(done: Done) -> None:
    """Check that in ASE's log the total energy stays, while the kinetic energy does not."""
    row = re.compile(r"^\d+\.\d+ +(-?\d+\.\d+) +-?\d+\.\d+ +(\d+\.\d+) +\d+\.\d+ *$", re.MULTILINE)
    total, kinetic = np.array([[float(cell) for cell in found] for found in row.findall(done.output)]).T
    assert len(total) > 5
    assert 0 < np.ptp(total) < 0.1 * np.ptp(kinetic)


def check_extras(workspace: Workspace) -> None:
    """Check that the extras the text installs exist, and that `.ci/run` installs them for this environment."""
    named = {extra for line in (workspace.folder / "pip.log").read_text().splitlines() for extra in extras_of(line)}
    assert named <= set(metadata("gaq").get_all("Provides-Extra") or [])
    script = (ROOT / ".ci" / "run").read_text()
    built = re.search(rf'^environment {workspace.environment} "([\w,]+)"', script, re.MULTILINE)
    assert built is not None
    assert named <= set(built[1].split(","))


def extras_of(text: str) -> list[str]:
    """The extras of ``pip install '.[a,b]'``."""
    return [extra for names in re.findall(r"\.\[([\w,]+)\]", text) for extra in names.split(",")]


@pytest.mark.docs
@pytest.mark.parametrize("block", RUN, ids=str)
def test_block_does_what_the_text_says(block: Block, workspace: Workspace, forces: Callable[[str], np.ndarray]) -> None:
    if block.missing:
        pytest.skip(f"{block} needs {' and '.join(block.missing)}, which this environment does not have")
    done: Done = workspace.run(block)
    assert done.code == 0, f"{block} ended with exit code {done.code}:\n{shortened(block.text)}\n{done.output[-6000:]}"
    for command, texts in PRINTED.items():
        if command in block.text:
            missing = [text for text in texts if text not in done.output]
            assert not missing, f"{block}: `{command}` did not print {missing}:\n{done.output[-6000:]}"
    if "-o " in block.text or " build " in block.text or "save(" in block.text:
        assert done.made, f"{block} wrote none of the files that it names"
    for name in done.made:
        check_file(workspace, forces, name)
    if "VelocityVerlet" in block.text:
        check_dynamics(done)
    if "quickstart_" in block.text:
        check_quickstart(workspace, block)
        check_extras(workspace)


def without_numbers(line: str) -> str:
    """A line of output with every number as ``#`` and one space for several, since numbers and widths may differ.

    What a log has before its messages is left out.
    """
    line = re.sub(r"^\[?\d{4}-\d\d-\d\d [\d:.,]+\]?(\[[\w.]+\])?( INFO: |\[INFO\] - (\[rank: 0\] )?)", "", line)
    return " ".join(re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", re.sub("-{3,}", "---", line)).split())


@pytest.mark.docs
@pytest.mark.parametrize("block", OUTPUT, ids=str)
def test_output_that_is_shown_is_printed(block: Block, workspace: Workspace) -> None:
    """Every line that a page shows occurs in what the block before it prints, in this order, up to its numbers.

    Three dots stand for lines that are left out, and for the end of a line.
    """
    before = [other for other in HERE if other.document == block.document and other.line < block.line]
    producer = next(other for other in reversed(before) if other.runs and other.file is None)
    if producer.missing:
        pytest.skip(f"{producer} needs {' and '.join(producer.missing)}, which this environment does not have")
    output = workspace.run(producer).output
    printed = iter([without_numbers(line) for line in output.splitlines()])
    for line in block.text.splitlines():
        shown = without_numbers(line.removesuffix("..."))
        if shown:
            same = (other for other in printed if other == shown or (line.endswith("...") and other.startswith(shown)))
            assert next(same, None) is not None, f"{block}: not printed: {line}\n{output[-6000:]}"


@pytest.mark.docs
@pytest.mark.skipif("mace" not in installed(), reason="the notebook trains MACE")
def test_the_notebook_runs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells check what its text says. Models that the tutorials have made are not made again."""
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[docs]'")
    import nbformat

    for name, value in workspace.variables.items():
        monkeypatch.setenv(name, value)
    where = {"metadata": {"path": str(workspace.folder)}}
    nbclient.NotebookClient(nbformat.read(NOTEBOOK, as_version=4), timeout=900, resources=where).execute()


def test_the_notebook_is_committed_with_what_it_prints_and_draws() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    printing = [cell for cell in cells if "print(" in "".join(cell["source"])]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert all(any(o["output_type"] == "stream" for o in cell["outputs"]) for cell in printing)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]) == 2


def test_output_has_its_own_language() -> None:
    assert [str(block) for block in BLOCKS if block.is_output != (block.language == "text")] == []


@pytest.mark.docs
@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_block_that_is_not_run_has_commands_and_options_that_exist(block: Block, workspace: Workspace) -> None:
    assert block.language == "bash", f"{block}: only commands can need what is not here"
    for line in block.text.replace("&&", "\n").splitlines():
        command = [word for word in re.split(r"\s+", line.split("  #")[0].strip()) if word]
        if command[0] == "pip":
            continue
        program = command[: next((i for i, word in enumerate(command) if word.startswith("--")), len(command))]
        done = workspace.execute([*program, "--help"])
        if "LAMMPS" in (block.not_run or "") and "No module named 'lammps'" in done.stdout:
            continue  # the command exists, but without LAMMPS even its help does not run
        assert done.returncode == 0, f"{block}: {' '.join(program)} --help: {done.stdout}"
        for option in command[len(program) :]:
            assert not option.startswith("--") or option in done.stdout, f"{block}: {program} has no {option}"


@pytest.mark.docs
@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_is_accepted(block: Block, workspace: Workspace) -> None:
    """The parser and a model accept the key `quantization`; the framework's own reader accepts the other keys."""
    settings = yaml.safe_load(block.text)
    if "quantization" in settings:
        value = settings["quantization"]
        config = parse_config(value)
        if isinstance(value, dict) and "distillation" in value:
            # The mapping written out: only what the text calls off by default may differ from the preset.
            plain = {key: part for key, part in value.items() if key not in ("attention", "overrides")}
            # `least_compression` concerns MACE's files only, so the mapping on NequIP's page leaves it out.
            plain["weights"] = {"least_compression": 4.0, **plain["weights"]}
            assert parse_config(plain) == parse_config("gaq")
            # Every NequIP model has gates; most MACE models have nothing to bound, and the line is a comment there.
            assert (config.attention is None) == (workspace.environment == "mace")
            assert config.overrides
    quickstart = next(b for b in workspace.blocks if f"quickstart_{workspace.environment}.py" in b.text)
    assert workspace.run(quickstart).code == 0, workspace.run(quickstart).output[-6000:]
    if workspace.environment == "mace":
        accept_in_mace(workspace, settings)
    else:
        accept_in_nequip(workspace, settings)


def accept_in_mace(workspace: Workspace, settings: dict[str, Any]) -> None:
    """Train a block that has an architecture with the stock command; prepare a trained model with a key alone."""
    import gaq
    from gaq_mace.root import is_quantized

    if settings.keys() == {"quantization"}:
        assert is_quantized(gaq.prepare(gaq.load(workspace.folder / "MACE.model"), settings["quantization"]))
        return
    folder = workspace.folder / "quickstart"
    training = yaml.safe_load((folder / "fp32.yml").read_text())
    training |= {**settings, "name": "yaml", "max_num_epochs": 1}
    if "quantization" in settings:
        training["quantization"] = {**settings["quantization"], "distillation": {"steps": 5}}
    (folder / "yaml.yml").write_text(yaml.safe_dump(training))
    script = "cd quickstart && mace_run_train --config yaml.yml"
    done = workspace.execute(["bash", "-c", script])
    assert done.returncode == 0, done.stdout[-6000:]
    model = gaq.load(folder / "yaml.model")
    assert is_quantized(model)
    if "interaction" in settings:
        assert type(model.interactions[-1]).__name__ == settings["interaction"]


def accept_in_nequip(workspace: Workspace, settings: dict[str, Any]) -> None:
    """Build the model of the quickstart's training file, changed as the block says, as ``nequip-train`` builds it."""
    import nequip.utils.resolvers  # noqa: F401  (`list_to_identity_dict`)
    from hydra.utils import instantiate
    from nequip.utils.global_state import set_global_state
    from omegaconf import OmegaConf

    from gaq.model.state import state_of

    set_global_state()
    text = (workspace.folder / "quickstart" / "nequip" / "fp32.yaml").read_text()
    # Numbers that NequIP would take from the statistics of the data.
    for name, value in (("num_neighbors_mean", 8.0), ("per_type_forces_rms", 1.0), ("per_atom_energy_mean", -1.0)):
        text = text.replace(f"${{training_data_stats:{name}}}", str(value))
    training = yaml.safe_load(text)
    quickstart_model = training["training_module"]["model"]
    model = settings.get("training_module", {}).get("model", {"_target_": quickstart_model["_target_"]})
    inner = model.get("model", model)
    assert inner["_target_"] == quickstart_model["_target_"]
    inner.pop("...", None)
    inner |= quickstart_model
    if inner is model:
        assert "quantization" in settings
        model = {"_target_": "gaq_nequip.quantized", "quantization": settings["quantization"], "model": inner}
    training["training_module"]["model"] = model
    resolved = OmegaConf.create(training).training_module.model
    built = instantiate(OmegaConf.to_container(resolved, resolve=True), _recursive_=False, _convert_="all")
    assert any(state_of(module) is not None for module in built.modules())


def test_every_block_can_be_run_or_says_why_not() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block}: give the fence one of the languages {', '.join(LANGUAGES)}"
        assert block.environment in (None, *ENVIRONMENTS), f"{block}: environment {block.environment!r}"
    assert {block.not_run for block in BLOCKS} - {None} == {
        "needs a GPU",
        "installs packages",
        "needs LAMMPS with its Python package",
        "takes hours",
        "needs the extra `completion`",
        ".ci/run extracts this very block and runs it in both environments",
    }


def test_blocks_that_are_skipped_where_a_package_is_missing_are_python_or_commands() -> None:
    """What is skipped in `.ci/run` has at least the syntax of its language."""
    for block in BLOCKS:
        if block.needs:
            assert block.language in ("bash", "python"), f"{block}: only what is run can need a package"
            if block.language == "python":
                ast.parse(block.text)
            else:
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def test_a_block_misses_packages_that_are_absent_or_older() -> None:
    block = replace(BLOCKS[0], needs=("pytest>=8", "pytest>=1000", "no-such-package>=1"))
    assert block.missing == ["pytest>=1000", "no-such-package>=1"]


def test_commands_stand_in_fences() -> None:
    """Only fences are collected, not Markdown's indented blocks."""
    command = re.compile(r" {4,}(python|pip|gaq|gaq_\w+|mace_\w+|nequip-\w+|import|from) ")
    for path in documents():
        outside = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not [line for line in outside.splitlines() if command.match(line)], path.name


def test_options_that_shorten_commands_are_documented() -> None:
    text = "".join(path.read_text() for path in documents())
    for command, shorter in SHORTER:
        assert command in text, f"{command} is in no document any more: remove its line in SHORTER"
        for option in re.findall(r"--[\w-]+", shorter):
            assert f"`{option}" in text, f"no document says what {option} does"


def test_the_test_command_is_the_one_that_ci_runs() -> None:
    (block,) = (block for block in BLOCKS if block.not_run is not None and ".ci/run" in block.not_run)
    script = (ROOT / ".ci" / "run").read_text()
    extraction = re.search(r"^test_command=\$\((.+)\)$", script, re.MULTILINE)
    assert extraction is not None
    done = subprocess.run(["bash", "-c", extraction[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == block.text
    for name in ENVIRONMENTS:
        built = re.search(rf'^environment {name} "([\w,]+)"', script, re.MULTILINE)
        assert built is not None
        assert set(extras_of(block.text)) <= set(built[1].split(","))


def test_supported_versions_of_the_text_are_those_of_pyproject() -> None:
    readme, project = ((ROOT / name).read_text() for name in ("README.md", "pyproject.toml"))
    (line,) = (line for line in readme.splitlines() if line.startswith("Supported: "))
    lowest = re.search(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    torch = re.search(r'"torch(>=)([\d.]+)"', project)
    assert lowest is not None
    assert torch is not None
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", project)]
    texts = [f"Python {lowest[1]} to 3.{max(minors)}", f"torch {torch[1]} {torch[2]}"]
    for name, distribution in (("MACE", "mace-torch"), ("NequIP", "nequip"), ("Allegro", "nequip-allegro")):
        bounds = re.search(rf'"{distribution}>=([\d.]+),<([\d.]+)"', project)
        assert bounds is not None, distribution
        texts.append(f"{name} >= {bounds[1]} (< {bounds[2]})")
    assert line == f"Supported: {', '.join(texts)}."


def test_the_package_description_has_no_links_that_lead_nowhere_there() -> None:
    text = runpy.run_path(str(ROOT / "setup.py"))["description"]()
    assert re.findall(r"\]\((?!http)", text) == []
    assert "(`docs/presets.md`)" in text
    assert "[symmetrix-xl](https://" in text
    assert "<!--" not in text


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_presets_of_the_text_are_those_there_are() -> None:
    for path in ("README.md", "docs/mace.md", "docs/nequip.md", "docs/presets.md"):
        text = (ROOT / path).read_text()
        assert not [preset for preset in PRESETS if preset not in text], path


@pytest.mark.parametrize("path", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_text_points_to_exists(path: Path) -> None:
    """Links with their anchors, extras, and environment variables; `test_architecture` checks files and code."""
    text = path.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", text):
        if target.startswith("http"):
            continue
        other = path.parent / target if target else path
        assert other.exists(), f"{path.name} links to {target}"
        headings = re.findall(r"^#+ (.+)$", other.read_text() if anchor else "", re.MULTILINE)
        anchors = {"#" + re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, f"{path.name} links to {target}{anchor}"
    extras = extras_of(text) + re.findall(r"gaq\[(\w+)\]", text)
    # Not what is installed, which may be of an earlier day.
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    assert set(extras) <= set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    sources = "".join(file.read_text() for package in ROOT.glob("gaq*/") for file in package.rglob("*.py"))
    for variable in re.findall(r"GAQ_[A-Z_]+", text):
        assert variable in sources, f"{path.name} names {variable}"
