"""The generated reference: complete, and an error where the code describes nothing; the pages as Sphinx reads them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import links
import pages
import pytest
import reference

import gaq
from gaq.config.schema import PRESETS, QuantizationConfig
from gaq.reporting.gates import evaluate_gates

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", sorted(set(reference.PAGES) - {"engine-api"}))
def test_every_part_can_be_generated_without_a_framework(name: str) -> None:
    assert len(reference.PAGES[name]().splitlines()) > 5


def test_the_configuration_has_every_key_with_its_default() -> None:
    text = reference.configuration()
    for key, value in reference._flat(PRESETS["gaq"].to_dict()):
        entry = text.partition(f"\n`{key}`\n")[2].partition("\n\n")[0]
        assert f"default `{reference.yaml_value(value)}`" in entry, key
    assert "`attention.gate_limit`\n: number or null; at least 0.001; default `null`; MACE and NequIP." in text
    assert "`weights.species_bits`\n: integer or null; 2 to 16; default `4`; NequIP only." in text
    assert "`scalars.granularity`\n: word; one of `per_tensor`, `per_channel`, `per_atom`; default `per_atom`;" in text
    assert not re.search(r"\bNone\b", text)


def test_a_field_without_a_description_is_an_error() -> None:
    @dataclass(frozen=True)
    class Described:
        """A section.

        Attributes:
            bits: how many,
                on two lines.
        """

        bits: int = 8

    @dataclass(frozen=True)
    class Forgotten(Described):
        __doc__ = Described.__doc__
        more: int = field(default=1)

    assert reference.attributes_of(Described) == {"bits": "how many, on two lines."}
    with pytest.raises(reference.MissingDescription, match="Forgotten: its docstring does not describe more"):
        reference.attributes_of(Forgotten)


def test_what_has_no_docstring_is_an_error() -> None:
    @dataclass
    class Bare:
        bits: int = 8

    with pytest.raises(reference.MissingDescription, match="Bare has no docstring"):
        reference.first_paragraph(Bare, "Bare")
    parser = argparse.ArgumentParser()
    action = parser.add_argument("--silent")
    with pytest.raises(reference.MissingDescription, match="silent has no help"):
        reference._argument(action, "command")


def test_every_section_of_the_configuration_is_described() -> None:
    text = reference.configuration()
    for section in dataclasses.fields(QuantizationConfig):
        assert f"`{section.name}`" in text
    assert len(reference.presets().splitlines()[0].split("|")) == len(PRESETS) + 2  # without `gaq`, with the key


def test_commands_have_the_arguments_of_their_parsers() -> None:
    text = reference.commands()
    for name in ("gaq quantize", "gaq lammps check", "nequip-deploy build", "gaq_mace_create_lammps_model"):
        assert f"### `{name}`\n" in text
    for option in ("--calibration CALIBRATION", "--nve-ps NVE_PS", "--train-dir TRAIN_DIR", "--format FORMAT"):
        assert f"`{option}`" in text


def test_every_public_name_is_in_the_reference() -> None:
    text = reference.api()
    for name in set(gaq.__all__) - {"__version__", "PRESETS"}:
        assert f"gaq.{name}\n" in text


def test_every_result_is_listed_with_its_command() -> None:
    text = reference.results()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        command = json.loads(path.read_text())["command"]
        assert f"[{path.name}](../benchmarks/results/{path.name})\n: `{command}`" in text
        assert "shared" not in command, f"{path.name}: a path of one machine"


def test_every_gate_is_explained() -> None:
    """And nothing that is no gate is explained as one."""
    section = (DOCS / "reports.md").read_text().partition("## The gates\n")[2].partition("\n## ")[0]
    explained = {
        name for line in re.findall(r"^(`.+)\n: ", section, re.MULTILINE) for name in re.findall("`(.+?)`", line)
    }
    assert explained == set(evaluate_gates({}, "gaq"))


def test_errors_of_the_page_are_those_of_the_code() -> None:
    sources = "".join(file.read_text() for package in ROOT.glob("gaq*/") for file in package.rglob("*.py"))
    entries = re.findall(r"^(`.+)\n: (.+)", (DOCS / "reference" / "errors.md").read_text(), re.MULTILINE)
    assert len(entries) > 15
    for terms, remedy in entries:
        for text in re.findall("`(.+?)`", terms):
            assert text in sources or remedy.startswith("This comes from"), text


def test_formats_of_the_page_are_those_of_the_code() -> None:
    from gaq.config.schema import VERSION
    from gaq.kernels.signatures import DEPLOYED_VERSION
    from gaq.model.state import FORMAT

    text = (DOCS / "reference" / "files.md").read_text()
    assert f"version of the stored form (now {FORMAT}) and of the configuration (now {VERSION})" in text
    assert f"version of its form (now {DEPLOYED_VERSION})" in text


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_pages_are_read_without_comments_and_placeholders(path: Path) -> None:
    if "{generated} engine-api" in path.read_text():
        pytest.importorskip("mace")
    text = pages.prepared(path.read_text(), path.parent)
    assert "<!--" not in text
    assert "{generated}" not in text


def test_links_to_what_is_no_page_name_its_place() -> None:
    assert pages.prepared("in [configs/](../configs).", DOCS) == "in `configs`."
    assert pages.prepared("see [tests](../tests/README.md#x).", DOCS) == "see tests (`tests/README.md`)."
    assert pages.prepared("see [engine](engine.md#gpus).", DOCS) == "see [engine](engine.md#gpus)."


def test_broken_links_of_a_site_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"><a href="b.html#there">b</a><a href="https://else.where/x">x</a></p>'
    )
    (tmp_path / "b.html").write_text('<p><a href="a.html#here">a</a><img src="c.png"></p>')
    assert links.broken(tmp_path) == ["a.html: b.html#there", "b.html: c.png"]


def test_the_decision_figure_is_the_one_its_script_draws() -> None:
    import runpy

    script = DOCS / "figures" / "choosing.py"
    assert script.with_suffix(".svg").read_text() == runpy.run_path(str(script))["figure"]()
