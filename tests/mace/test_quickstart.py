"""The training files in ``configs/``; the quickstart is run in ``tests/docs``."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from gaq.config.parse import PRESETS, parse_config

pytest.importorskip("mace", reason="needs MACE: pip install '.[mace]'")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("mace_*.yml"))


def parse_training_file(path: Path) -> Any:
    """The arguments MACE's own parser reads from a training file."""
    from mace.tools import build_default_arg_parser

    parser = build_default_arg_parser()
    if "--quantization" not in parser._option_string_actions:  # the import hook adds it where it is active
        parser.add_argument("--quantization")
    return parser.parse_args(["--config", str(path)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses(path: Path) -> None:
    arguments = parse_training_file(path)
    preset = path.stem.removeprefix("mace_").removeprefix("finetune_")
    assert arguments.name == path.stem
    assert parse_config(arguments.quantization).weights == parse_config(preset).weights
    if "finetune" not in path.stem:
        assert arguments.quantization == preset


def test_every_preset_has_a_config() -> None:
    presets = {path.stem.removeprefix("mace_") for path in CONFIGS if "finetune" not in path.stem}
    assert presets | {"w8a16"} == set(PRESETS)  # w8a16 is another name of gaq


def test_commented_mapping_is_the_preset() -> None:
    text = (ROOT / "configs" / "mace_gaq.yml").read_text()
    lines = text[text.index("# quantization:") :].splitlines()
    mapping = yaml.safe_load(textwrap.dedent("\n".join(line.removeprefix("#") for line in lines)))
    assert parse_config(mapping["quantization"]) == parse_config("gaq")
