"""NequIP's fused convolution through the GPU kernels: NequIP's own energies and forces."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("nequip") is None:
    pytest.skip("needs NequIP: pip install '.[nequip]'", allow_module_level=True)

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

import gaq
from gaq_nequip.engine.fused import FusedInteractionBlock, fuse
from gaq_nequip.evaluate import NequIPPotential
from gaq_nequip.freeze import freeze

STRUCTURES = [molecule("H2O"), molecule("CH4"), Atoms("CH", positions=[[0, 0, 0], [0, 0, 30.0]])]


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """Restore torch's default dtype, which NequIP sets to float64."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def make(parity: bool, lmax: int, features: int | list[int] = 4) -> Any:
    set_global_state()
    model = NequIPGNNModel(
        seed=0,
        model_dtype="float64",
        r_max=3.0,
        type_names=["H", "C", "O"],
        avg_num_neighbors=4.0,
        l_max=lmax,
        parity=parity,
        num_layers=2,
        num_features=features,
        radial_mlp_width=8,
    )
    prepared = gaq.prepare(model, {"preset": "w8", "distillation": {"steps": 0}, "weights": {"rounding": "nearest"}})
    return freeze(gaq.convert(gaq.calibrate(prepared, STRUCTURES[:2], progress=False)))


@pytest.mark.parametrize(("parity", "lmax", "features"), [(False, 1, 4), (True, 1, [5, 3]), (False, 2, [5, 3, 2])])
def test_fused_is_the_same_function(
    parity: bool, lmax: int, features: int | list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gaq.kernels.gpu import convolution as gpu_convolution

    model = make(parity, lmax, features)
    expected = NequIPPotential(copy.deepcopy(model))(STRUCTURES)
    assert fuse(model, "cuda") == {}
    assert sum(isinstance(m, FusedInteractionBlock) for m in model.modules()) == 2
    calls = []
    fused = gpu_convolution.convolution
    monkeypatch.setattr(gpu_convolution, "convolution", lambda *args: calls.append(1) or fused(*args))
    results = NequIPPotential(model)(STRUCTURES)
    assert calls
    np.testing.assert_allclose(results[0], expected[0], atol=1e-5)
    scale = float(np.abs(np.concatenate(expected[1])).max())
    np.testing.assert_allclose(np.concatenate(results[1]), np.concatenate(expected[1]), atol=3e-6 * scale)


TRACED = """
import torch
from test_nequip_fused import STRUCTURES, fuse, make
from gaq.kernels import gpu
from gaq.kernels.gpu import convolution as gpu_convolution

# As on a GPU. Nothing is launched, because tensors have no data.
gpu.chosen = lambda device: True
gpu_convolution.why_not = lambda: None
from nequip.data import AtomicDataDict, from_ase
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.utils.aot import ListInputOutputWrapper, get_dynamic_shapes, prepare_model_for_compile
from nequip.utils.fx import nequip_make_fx
from nequip.scripts._compile_utils import COMPILE_TARGET_DICT

model = make(False, 1)
assert fuse(model, "cuda") == {}
atoms = STRUCTURES[1].copy()
atoms.cell, atoms.pbc = [12.0, 12.0, 12.0], True
data = from_ase(atoms)
for transform in (ChemicalSpeciesToAtomTypeMapper(["H", "C", "O"]), NeighborListTransform(3.0)):
    data = transform(data)
target = COMPILE_TARGET_DICT["ase"]
dims = {name: torch.export.Dim(name, min=2) for name in ("node", "edge")}
batch_map = target["batch_map_settings"]({"graph": torch.export.Dim("graph"), **dims})
data = target["data_settings"](data)
fields = list(target["input"])
wrapped = prepare_model_for_compile(ListInputOutputWrapper(model, fields, target["output"]), "cpu")
graph = nequip_make_fx(model=wrapped, data={k: data[k] for k in fields}, fields=fields, seed=1)
exported = torch.export.export(
    graph, tuple(data[k] for k in fields), dynamic_shapes=get_dynamic_shapes(fields, batch_map)
)
names = [str(node.target) for node in exported.graph.nodes]
print(sum("edge_convolution_triton.default" in n for n in names), end=" ")
print(sum("edge_convolution_triton_backward.default" in n for n in names), end=" ")
# The first step of Inductor.
from torch._functorch.aot_autograd import aot_export_module

arguments = [data[k] for k in fields]
lowered, _ = aot_export_module(exported.module(), arguments, trace_joint=False)
names = [str(node.target) for node in lowered.graph.nodes]
print(sum("triton_kernel_wrapper" in n for n in names))
"""


@pytest.mark.slow
def test_nequips_export_holds_the_kernels(tmp_path: Path) -> None:
    """What `nequip-compile` does before Inductor, in a process of its own without the interpreter."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "GAQ_CACHE": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": paths}
    command = [sys.executable, "-W", "ignore", "-c", TRACED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Two layers, their derivatives, and as many kernels.
    assert done.stdout.split()[-3:] == ["2", "2", "4"]
