"""The example from data to comparison table, and the training files in ``configs/``."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict
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


@pytest.mark.slow
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tblite", reason="needs tblite: pip install '.[mace,examples]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[mace,examples]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart_mace
    import xtb_dataset

    monkeypatch.setattr(xtb_dataset, "WARM_UP_FRAMES", 5)
    options = "--train 20 --test 10 --epochs 2 --md-fs 20"
    results = quickstart_mace.main(["--directory", str(tmp_path), *options.split()])

    assert list(results) == ["fp32", "gaq"]
    for result in results.values():
        assert all(math.isfinite(value) for value in asdict(result).values())
    fp32, gaq = results["fp32"], results["gaq"]
    assert gaq.force_mae_mev_per_angstrom < 1.1 * fp32.force_mae_mev_per_angstrom
    assert gaq.size_ratio >= 4
    assert gaq.lee_mev_per_angstrom <= 0.15
    assert json.loads((tmp_path / "comparison.json").read_text()) == {k: asdict(r) for k, r in results.items()}
    assert (tmp_path / "nve.png").stat().st_size > 0

    stock, quantized = ((tmp_path / f"{name}.yml").read_text().splitlines() for name in ("fp32", "gaq"))
    assert set(stock) ^ set(quantized) == {"name: fp32", "name: gaq", "quantization: gaq"}
