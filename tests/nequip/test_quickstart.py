"""The training files in ``configs/``, and those that the quickstart writes; it is run in ``tests/docs``."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from gaq.config.parse import PRESETS, parse_config

pytest.importorskip("nequip", reason="needs NequIP: pip install '.[nequip]'")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def read_training_file(path: Path) -> dict[str, Any]:
    """A training file as ``nequip-train`` reads it, interpolations that need a run left as they stand."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[return-value]  # a mapping, as the file is one


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses(path: Path) -> None:
    config = read_training_file(path)
    preset = path.stem.removeprefix("nequip_").removeprefix("allegro_").removeprefix("finetune_")
    assert config["name"] == path.stem
    assert parse_config(config["quantization"]).weights == parse_config(preset).weights
    if "finetune" not in path.stem:
        assert config["quantization"] == preset
    assert f"-cn {path.stem}\n" in path.read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_the_parts_of_a_run(path: Path) -> None:
    """The data module, the trainer and the model take the arguments they are given."""
    if path.stem.startswith("allegro") and find_spec("allegro") is None:
        pytest.skip("needs Allegro: pip install '.[allegro]'")
    import nequip.utils.resolvers  # noqa: F401  (`list_to_identity_dict`)
    from hydra.utils import get_method, instantiate
    from nequip.data.datamodule import NequIPDataModule
    from omegaconf import OmegaConf

    config = OmegaConf.load(path)
    config.hydra.runtime = {"output_dir": "out"}
    text = OmegaConf.to_yaml(config).replace("${hydra:runtime.output_dir}", "out")
    # What the statistics of the data would fill in.
    for name, value in (("num_neighbors_mean", 8.0), ("per_type_forces_rms", 1.0), ("per_atom_energy_mean", -1.0)):
        text = text.replace(f"${{training_data_stats:{name}}}", str(value))
    run = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert isinstance(run, dict)
    assert isinstance(instantiate(run["data"], _recursive_=False), NequIPDataModule)
    instantiate(run["trainer"])
    model = run["training_module"]["model"]
    build = get_method(model.pop("_target_"))
    if "checkpoint_path" not in model:
        build(**model)


def test_every_preset_has_a_config() -> None:
    stems = {path.stem.removeprefix("nequip_") for path in CONFIGS if path.stem.startswith("nequip_")}
    assert {stem for stem in stems if "finetune" not in stem} | {"w8a16"} == set(
        PRESETS
    )  # w8a16 is another name of gaq


def test_configs_differ_in_name_and_preset_only() -> None:
    def rest(preset: str) -> dict[str, Any]:
        config = read_training_file(ROOT / "configs" / f"nequip_{preset}.yaml")
        return {key: value for key, value in config.items() if key not in ("name", "quantization")}

    assert all(rest(preset) == rest("gaq") for preset in set(PRESETS) - {"w8a16"})


def test_commented_mapping_is_the_preset() -> None:
    text = (ROOT / "configs" / "nequip_gaq.yaml").read_text()
    lines = text[text.index("# quantization:") :].splitlines()
    mapping = yaml.safe_load(textwrap.dedent("\n".join(line.removeprefix("#") for line in lines)))
    assert parse_config(mapping["quantization"]) == parse_config("gaq")


def test_training_files_differ_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import quickstart_nequip

    files = quickstart_nequip.write_training_files(tmp_path, 20, "cpu", 0)
    stock, quantized = (path.read_text().splitlines() for path in files.values())
    assert set(stock) ^ set(quantized) == {"name: fp32", "name: gaq", "quantization: gaq"}
