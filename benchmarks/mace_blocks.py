"""Speed of MACE's interaction blocks through the fused kernels: a float model, accelerated and not, in one process.

    python benchmarks/mace_blocks.py [--repeats 3] [--only NAME ...]

Random weights, a metal cell of 64 atoms of seven species (54 neighbours within 6 Å), one thread. A call computes the
energy, forces and stress of one graph; building the graph is not counted. MACE's forward pass and the engine take
turns. The speed-up is the median of the ratios of processor time, the faster of two calls on each side.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import numpy as np
import torch
from common import write_result
from foundation_shapes import ALL_ELEMENTS, HEADS, RESIDUAL, SHAPES, alloy_cell, build

from gaq.reporting.tables import markdown_table
from gaq.untyped import AnyModule, Batch, Document
from gaq_mace.attention import GAQAttentionResidualInteractionBlock
from gaq_mace.engine import accelerate, decelerate
from gaq_mace.evaluate import make_batches

OURS = GAQAttentionResidualInteractionBlock.__name__
MEDIUM: dict[str, Any] = {
    "hidden_irreps": "128x0e+128x1o",
    "r_max": 6.0,
    "num_bessel": 10,
    "interaction_cls_first": RESIDUAL,
}
BLOCKS: dict[str, dict[str, Any]] = {
    "robust attention, 128x0e+128x1o": {**MEDIUM, "interaction_cls_first": OURS, "interaction_cls": OURS},
    "MACE's attention, 128x0e+128x1o": {
        **MEDIUM,
        "interaction_cls": "RealAgnosticAttResidualInteractionBlock",
        "apply_cutoff": False,
    },
    "non-linear, MH-1": SHAPES["MH-1"],
    "non-linear, OMOL": SHAPES["OMOL"],
}


def timed(model: AnyModule, batch: Batch) -> tuple[float, Document]:
    """Processor time in seconds and results of the faster of two calls."""
    best: tuple[float, Document] | None = None
    for _ in range(2):
        data = {key: value.clone() if torch.is_tensor(value) else value for key, value in batch.items()}
        start = time.process_time()
        outputs = model(data, compute_stress=True)
        taken = time.process_time() - start
        if best is None or taken < best[0]:
            best = taken, outputs
    assert best is not None
    return best


def measure(name: str, repeats: int) -> Document:
    """One row of the table."""
    model = build(BLOCKS[name]).requires_grad_(False)
    atoms = alloy_cell(np.random.default_rng(0))
    atoms.info.update(charge=0, spin=1)
    (batch,) = make_batches(model, [atoms], 1)
    stock, fused = [], []
    for number in range(repeats + 1):
        decelerate(model)
        seconds, expected = timed(model, batch)
        accelerate(model)
        fused_seconds, result = timed(model, batch)
        if number:  # the first pass compiles
            stock.append(seconds)
            fused.append(fused_seconds)
    difference = (result["forces"] - expected["forces"]).norm() / expected["forces"].norm()
    return {
        "model": name,
        "atoms": len(atoms),
        "edges": int(batch["edge_index"].shape[1]),
        "mace_ms": 1e3 * min(stock),
        "engine_ms": 1e3 * min(fused),
        "speed_up": statistics.median(s / f for s, f in zip(stock, fused, strict=True)),
        "relative_force_difference": float(difference),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(BLOCKS), choices=list(BLOCKS), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.only:
        rows.append(measure(name, arguments.repeats))
        print(rows[-1], flush=True)
        gc.collect()
    print(markdown_table(rows, list(rows[0])))
    if arguments.only == list(BLOCKS):
        print(write_result("mace_blocks", rows, elements=len(ALL_ELEMENTS), heads=len(HEADS), threads=1))


if __name__ == "__main__":
    main()
