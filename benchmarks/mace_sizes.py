"""Sizes of MACE files by the number of elements: the stock float32 file against ours, random weights.

    python benchmarks/mace_sizes.py

Trained weights compress a little differently, so the numbers are accurate to a few per cent.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import mace  # noqa: F401  (before e3nn)
import numpy as np
import torch
from common import write_result
from e3nn import o3
from mace import modules

import gaq
from gaq.reporting.tables import markdown_table
from gaq.untyped import Document
from gaq_mace.summary import rows as inspection_rows


def float_model(elements: int, irreps: str) -> torch.nn.Module:
    """A model of the size of a foundation model, with random weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    return modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=10,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        interaction_cls_first=modules.RealAgnosticResidualInteractionBlock,
        num_interactions=2,
        num_elements=elements,
        hidden_irreps=o3.Irreps(irreps),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(elements),
        avg_num_neighbors=60.0,
        atomic_numbers=list(range(1, elements + 1)),
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        radial_MLP=[64, 64, 64],
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[Document] = []
    for elements in (3, 10, 89):
        for irreps in ("128x0e", "128x0e+128x1o"):
            model = float_model(elements, irreps)
            with tempfile.TemporaryDirectory() as folder:
                stock, ours = Path(folder) / "float.model", Path(folder) / "ours.model"
                torch.save(model, stock)
                for preset in ("gaq", "w8", "w4a16", "w4"):
                    quantized = gaq.prepare(
                        copy.deepcopy(model), {"preset": preset, "weights": {"rounding": "nearest"}}
                    )
                    gaq.save(gaq.convert(quantized), ours)
                    rows.append(
                        {
                            "elements": elements,
                            "hidden_irreps": irreps,
                            "preset": preset,
                            "float_bytes": stock.stat().st_size,
                            "bytes": ours.stat().st_size,
                            "size_ratio": stock.stat().st_size / ours.stat().st_size,
                            "weights": sorted(
                                {
                                    row.weights
                                    for row in inspection_rows(quantized, bystanders=False)
                                    if "int" in row.weights
                                }
                            ),
                        }
                    )
    write_result("mace_sizes", rows)
    print(markdown_table([{**row, "size_ratio": f"{row['size_ratio']:.1f}x"} for row in rows], list(rows[0])))


if __name__ == "__main__":
    main()
