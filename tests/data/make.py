"""Make the files of this folder: frames of ethanol labelled with GFN2-xTB, and small models trained on them.

    python tests/data/make.py structures   # needs pip install '.[examples]'; half a minute
    python tests/data/make.py mace         # needs pip install '.[mace]'; three minutes
    python tests/data/make.py nequip       # needs pip install '.[nequip]'; two minutes

Structures are frames of two separate Langevin trajectories at 500 K. Models are trained by the stock commands
(``mace_run_train``, ``nequip-train``) and stored in a form that no version of a framework is bound to: the options of
the architecture in ``NAME.yaml`` and the parameters, by name, in ``NAME.safetensors``.
`trained_model` in `tests/helpers/mace_models.py` and `nequip_models.py` builds the models again.

The same seeds give the same files on one machine only: tests that pin numbers have to be read again after this.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ase.build import molecule
from ase.io import write
from ase.optimize import BFGS
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE.parents[1] / "examples")]
from trained import SPLIT, TEST, TRAIN  # noqa: E402

FRAMES = {TRAIN: sum(SPLIT), TEST: 40}
COLUMNS = ["symbols", "positions", "REF_forces"]


def make_structures() -> None:
    """Frames of ethanol at 500 K with energies (eV) and forces (eV/Å) of GFN2-xTB."""
    from xtb_dataset import WARM_UP_FRAMES, sample, xtb_calculator

    from gaq.progress import Progress

    start = molecule("CH3CH2OH")
    start.calc = xtb_calculator()
    BFGS(start, logfile=None).run(fmax=0.01, steps=500)  # eV/Å
    generators = (np.random.default_rng(seed) for seed in np.random.SeedSequence(0).spawn(2))
    for (path, count), generator in zip(FRAMES.items(), generators, strict=True):
        with Progress(count + WARM_UP_FRAMES, path.name, "frame") as progress:
            write(path, sample(start, count, generator, progress), format="extxyz", columns=COLUMNS)


def store(name: str, options: dict[str, Any], parameters: Any) -> None:
    """Write the options and the parameters of a model.

    Args:
        name: the files are NAME.yaml and NAME.safetensors.
        options: plain data.
        parameters: pairs of a name and a tensor.
    """
    (HERE / f"{name}.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    save_file({key: p.detach().cpu().contiguous() for key, p in parameters}, HERE / f"{name}.safetensors")


def run(folder: str, *command: str) -> None:
    script = Path(sys.executable).with_name(command[0])
    subprocess.run([str(script), *command[1:]], cwd=folder, check=True)


MACE: dict[str, Any] = {
    "name": "mace",
    "train_file": str(TRAIN),
    "valid_fraction": 0.1,
    "test_file": str(TEST),
    "E0s": "average",
    "model": "MACE",
    "hidden_irreps": "32x0e + 32x1o",
    "r_max": 4.0,
    "max_ell": 2,
    "correlation": 2,
    "num_interactions": 2,
    "batch_size": 4,
    "valid_batch_size": 12,
    "max_num_epochs": 60,
    "lr": 0.01,
    "energy_key": "REF_energy",
    "forces_key": "REF_forces",
    "energy_weight": 1,
    "forces_weight": 100,
    "default_dtype": "float32",
    "device": "cpu",
    "seed": 1,
    "amsgrad": True,
    "ema": True,
    "ema_decay": 0.99,
    "scheduler_patience": 2,
    "lr_factor": 0.6,
    "plot": False,
}


def make_mace() -> None:
    """A MACE model of two interactions, trained by `mace_run_train`."""
    import mace  # noqa: F401  (before e3nn)
    import torch
    from mace.tools.scripts_utils import extract_config_mace_model

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mace.yml").write_text(yaml.safe_dump(MACE))
        run(folder, "mace_run_train", "--config", "mace.yml")
        model = torch.load(Path(folder) / "mace.model", map_location="cpu", weights_only=False)
    config = extract_config_mace_model(model)
    options = {
        "r_max": float(config["r_max"]),
        "num_bessel": int(config["num_bessel"]),
        "num_polynomial_cutoff": int(config["num_polynomial_cutoff"]),
        "max_ell": int(config["max_ell"]),
        "interaction_cls": config["interaction_cls"].__name__,
        "interaction_cls_first": config["interaction_cls_first"].__name__,
        "num_interactions": int(config["num_interactions"]),
        "num_elements": int(config["num_elements"]),
        "hidden_irreps": str(config["hidden_irreps"]),
        "MLP_irreps": str(config["MLP_irreps"]),
        "atomic_energies": np.asarray(config["atomic_energies"]).tolist(),
        "avg_num_neighbors": float(config["avg_num_neighbors"]),
        "atomic_numbers": [int(z) for z in config["atomic_numbers"]],
        "correlation": int(config["correlation"]),
        "radial_type": str(config["radial_type"]),
        "radial_MLP": [int(width) for width in config["radial_MLP"]],
        "atomic_inter_scale": np.asarray(config["atomic_inter_scale"]).tolist(),
        "atomic_inter_shift": np.asarray(config["atomic_inter_shift"]).tolist(),
    }
    store("mace", options, model.named_parameters())


def make_nequip() -> None:
    """A NequIP model of two layers, trained by `nequip-train`."""
    import torch
    from nequip_runs import training_config

    import gaq

    config = training_config(TRAIN, TEST, SPLIT)
    config["trainer"]["max_epochs"] = 60
    training = config["training_module"]
    training["model"]["radial_mlp_width"] = 64
    training["lr_scheduler"] = {
        "scheduler": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 60},
        "interval": "epoch",
        "frequency": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "nequip.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        run(folder, "nequip-train", "-cp", folder, "-cn", "nequip", "hydra.run.dir=out")
        checkpoint = Path(folder) / "out" / "best.ckpt"
        model = gaq.load(checkpoint)
        options = torch.load(checkpoint, map_location="cpu", weights_only=False)["hyper_parameters"]["model"]
    architecture = {key: value for key, value in options.items() if key not in ("_target_", "seed", "model_dtype")}
    store("nequip", plain(architecture), model.named_parameters())


def plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries in the place of tensors, arrays and their subclasses."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


MAKERS = {"structures": make_structures, "mace": make_mace, "nequip": make_nequip}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=MAKERS)
    MAKERS[parser.parse_args().what]()
