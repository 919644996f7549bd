"""NequIP for benchmarks/gpu.py: one model in all its forms."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_cases import COMPILED, CUEQ, FP32, OEQ, PRESETS, VARIANTS, water
from gpu_measures import MARGIN_SECONDS

import gaq


class Nequip:
    """One model through NequIP's own modifiers and ours, and as the file that `nequip-compile` makes of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from nequip.model import NequIPGNNModel
        from nequip.utils.global_state import set_global_state

        set_global_state()
        self.device, self.tiny = options.device, options.tiny
        self.end = time.perf_counter() + 60 * options.minutes
        sizes = {"num_layers": 2, "num_features": 8, "l_max": 1} if self.tiny else {"num_layers": 4, "num_features": 64}
        self.made = {
            "seed": 1,
            "model_dtype": "float32",
            "type_names": ["H", "O"],
            "r_max": 2.5 if self.tiny else 5.0,
            "l_max": 2,
            "parity": True,
            "avg_num_neighbors": 30.0,
            **sizes,
        }
        self.build = lambda: NequIPGNNModel(**self.made)

    def missing(self, kind: str) -> str | None:
        if kind in VARIANTS:
            return "only in MACE's engine"
        package = {CUEQ: "cuequivariance_torch", OEQ: "openequivariance"}.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            return "not installed"
        return "needs a GPU" if package is not None and self.device == "cpu" else None

    def data(self, atoms: Any) -> dict[str, torch.Tensor]:
        """The input of the model for a structure, on the CPU."""
        from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

        data: dict[str, torch.Tensor] = compute_neighborlist_(from_ase(atoms), r_max=self.made["r_max"])
        data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([0 if z == 1 else 1 for z in atoms.numbers])
        for key, value in data.items():
            if torch.is_tensor(value) and value.dtype == torch.float32:
                data[key] = value.double()
        return data

    def compiled(self) -> torch.nn.Module:
        """The model as the stock `nequip-compile` compiles a checkpoint, one file for all sizes.

        Not `compile_mode="compile"` of the builder: that is for training, and runs eagerly on a single structure.

        Raises:
            RuntimeError: with the reason, if the command writes no file.
        """
        from nequip.model.inference_models import load_compiled_model
        from nequip.scripts._compile_utils import COMPILE_TARGET_DICT

        from gaq_nequip.deploy.compile import save_data

        fields = COMPILE_TARGET_DICT["ase"]["input"]
        example = self.data(water(24))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint, path, structure = folder / "model.ckpt", folder / "model.nequip.pt2", folder / "example.pt"
            self.write_checkpoint(checkpoint)
            save_data({key: example[key] for key in fields}, structure)
            command = [sys.executable, "-m", "nequip.scripts.compile", str(checkpoint), str(path)]
            command += ["--mode", "aotinductor", "--device", self.device, "--target", "ase"]
            command += ["--data-path", str(structure)]
            # These variables are for our kernels, not for the stock command.
            environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GAQ_KERNELS")}
            # The comparison in nequip-compile has an absolute bound for trained models; the table has the difference.
            environment["NEQUIP_SKIP_AOTI_MODEL_CHECK"] = "1"
            begin = time.perf_counter()
            seconds = max(1.0, self.end - begin - MARGIN_SECONDS)
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=folder
                )
            except subprocess.TimeoutExpired as error:
                raise RuntimeError(f"nequip-compile took longer than the {seconds:.0f} s that were left") from error
            if done.returncode != 0 or not path.is_file():
                lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["nothing written"]
                # Hints or more output of a C++ compiler may follow the reason.
                reason = next((line for line in reversed(lines) if "rror:" in line), lines[-1])
                raise RuntimeError(f"nequip-compile: {reason[:200]}")
            print(f"nequip-compile: {time.perf_counter() - begin:.0f} s", flush=True)
            return load_compiled_model(str(path), self.device)[0]  # type: ignore[no-any-return]

    def write_checkpoint(self, path: Path) -> None:
        """Write the checkpoint that training would write, without what only training reads."""
        import lightning
        from nequip.train import NequIPLightningModule

        target = "nequip.train.NequIPLightningModule"
        model = {"_target_": "nequip.model.NequIPGNNModel", **self.made}
        settings = {
            "model": model,
            "num_datasets": {"train": 1, "val": 1, "test": 0},
            "info_dict": {"versions": {}, "training_module": {"_target_": target, "model": model}},
        }
        content = {
            "state_dict": NequIPLightningModule(**settings).state_dict(),
            "hyper_parameters": settings,
            "pytorch-lightning_version": lightning.__version__,
        }
        torch.save(content, path)

    def make(self, kind: str) -> Any:
        from nequip.model.modify_utils import modify

        model: Any = self.compiled() if kind == COMPILED else self.build()
        modifier = {CUEQ: "enable_CuEquivariance", OEQ: "enable_OpenEquivariance"}.get(kind)
        if modifier is not None:
            model = modify(model, [{"modifier": modifier}])
        if kind in PRESETS:
            spec = {"preset": kind, "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}}
            model = gaq.prepare(model, spec)
            gaq.calibrate(model, [water(3 if self.tiny else 24)], progress=False)
            model = gaq.convert(model)
        if kind == FP32 or kind in PRESETS:
            from gaq_nequip.engine.fused import fuse

            fuse(model, self.device)
            model.requires_grad_(False)  # as in a compiled file: tables of weights have no gradient
        model = model.to(self.device).eval()

        def bind(atoms: Any) -> Callable[[], torch.Tensor]:
            from nequip.data import AtomicDataDict

            data = AtomicDataDict.to_(self.data(atoms), self.device)

            def step() -> torch.Tensor:
                return model(dict(data))[AtomicDataDict.FORCE_KEY].detach()

            return step

        return bind
